"""examples/omniopsd: the paper's values where it states them, memory that adds up, files that differ where they say."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from opsd.config import load_config
from opsd.train import train
from tests.jobs import base_words, text_job

FOLDER = Path(__file__).parents[1] / "examples" / "omniopsd"
FILES = {  # file -> size, GiB of the card
    "qwen2.5-omni-3b.yaml": ("3B", 80),
    "qwen2.5-omni-3b-40gb.yaml": ("3B", 40),
    "qwen2.5-omni-3b-24gb.yaml": ("3B", 24),
    "qwen2.5-omni-7b.yaml": ("7B", 80),
    "qwen2.5-omni-7b-40gb.yaml": ("7B", 40),
    "qwen2.5-omni-7b-24gb.yaml": ("7B", 24),
}
# What arXiv 2606.15920 states.
PAPER = {
    "model.dtype": "bfloat16",
    "rollout.max_new_tokens": 512,
    "teacher.kind": "ema",
    "teacher.mu": 0.999,
    "objective.kind": "distill",
    "objective.divergence": "jsd",
    "objective.beta": 0.5,
    "objective.temperature": 1.0,
    "objective.alpha": 0.2,
    "prompts.privilege": "rationale",
    "train.steps": 2000,
}
# Where a card may ask for something else; everything else is the same in all six.
FREE = {
    *("model.path", "model.adapter", "model.lora_r", "model.lora_alpha", "model.freeze", "optim.lr"),
    *("prompts.max_prompt_tokens", "media.frames", "media.max_pixels", "teacher.lora_average", "engine.token_budget"),
    *("rollout.slots", "objective.workspace_mib", "engine.feature_cache_mib", "engine.teacher_cache_device_mib"),
}
LANGUAGE = {
    "3B": {"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36,
           "num_attention_heads": 16, "num_key_value_heads": 2, "tie_word_embeddings": False},
    "7B": {"vocab_size": 152064, "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28,
           "num_attention_heads": 28, "num_key_value_heads": 4, "tie_word_embeddings": False},
}  # fmt: skip


def flat(config):
    return {f"{s}.{k}": v for s, keys in config.model_dump(mode="json").items() for k, v in keys.items()}


def test_these_are_the_files():
    assert {path.name for path in FOLDER.iterdir()} == {*FILES, "cold_start.yaml"}


@pytest.mark.parametrize("name", FILES)
def test_the_papers_values(name):
    size, card = FILES[name]
    config = load_config(FOLDER / name)
    assert {key: value for key, value in flat(config).items() if key in PAPER} == PAPER
    assert config.model.path == f"Qwen/Qwen2.5-Omni-{size}" and 1 <= config.media.frames <= 16
    if config.model.adapter == "none":
        assert config.optim.lr == 1e-6 and "vision" in config.model.freeze
    else:
        assert config.model.freeze == (), "an adapter lies in the language model alone"
    sequence = config.prompts.max_prompt_tokens + config.rollout.max_new_tokens
    assert sequence == config.engine.token_budget and sequence <= 24 * 1024
    assert (sequence == 24 * 1024) == (name == "qwen2.5-omni-7b.yaml")
    first = (FOLDER / name).read_text(encoding="utf-8").splitlines()[:2]
    assert f"Qwen2.5-Omni-{size} on one {card} GB GPU" in first[0] and f"examples/omniopsd/{name} " in first[1]


@pytest.mark.parametrize("name", FILES)
def test_a_line_says_paper_where_it_is_the_papers(name):
    """[K] stands beside the values of PAPER that the file states, and beside no other but these."""
    also = {"model.path", "media.frames", "optim.lr", "model.freeze", "prompts.max_prompt_tokens"}
    section, marked = "", set()
    for line in (FOLDER / name).read_text(encoding="utf-8").splitlines():
        key = re.match(r"( *)(\w+):", line)
        if key and not key[1]:
            section = key[2]
        elif key and "# [K]" in line:
            marked.add(f"{section}.{key[2]}")
        elif key and "[K]" not in line:
            assert f"{section}.{key[2]}" not in PAPER, line
    assert marked - also <= PAPER.keys()


def test_the_files_differ_where_a_card_asks_for_it():
    first, *others = (flat(load_config(FOLDER / name)) for name in FILES)
    for other in others:
        assert {key for key in first if first[key] != other[key]} <= FREE


@lru_cache
def shapes(size):
    """Numbers of weights by part, and widths of the language model's linear layers, from transformers' own class."""
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    width = LANGUAGE[size]["hidden_size"]
    audio = {"d_model": 1280, "encoder_layers": 32, "encoder_attention_heads": 20, "encoder_ffn_dim": 5120}
    vision = {"depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16}
    config = Qwen2_5OmniThinkerConfig(
        text_config=LANGUAGE[size],
        audio_config={**audio, "output_dim": width},
        vision_config={**vision, "out_hidden_size": width},
    )
    config.tie_word_embeddings = False
    with torch.device("meta"):
        model = Qwen2_5OmniThinkerForConditionalGeneration(config)
    linear = [m for m in model.model.layers.modules() if isinstance(m, nn.Linear)]
    layers = sum(m.weight.numel() for m in linear)
    ins, outs = (sum(getattr(m, side) for m in linear) for side in ("in_features", "out_features"))
    return sum(p.numel() for p in model.parameters()), layers, model.lm_head.weight.numel(), ins, outs


def expected(size, config):
    """The terms of a file's comment, in 1e9 bytes, from the shapes and the config."""
    every, layers, head, ins, outs = shapes(size)
    text, r = LANGUAGE[size], config.model.lora_r
    sequence = config.prompts.max_prompt_tokens + config.rollout.max_new_tokens
    per_token = 2 * 2 * text["num_hidden_layers"] * text["num_key_value_heads"] * 128
    caches = config.engine.feature_cache_mib + config.engine.teacher_cache_device_mib
    if config.model.adapter == "none":
        model, activations = [4 * every, 4 * layers, 8 * layers, 4 * layers, 2 * (layers + head)], 0.65e6
    else:
        dense = config.teacher.lora_average == "dense"
        adapter = 16 * r * (ins + outs) if dense else 4 * r * ins + 16 * r * outs
        model = [2 * every, adapter, 4 * layers if dense else 4 * r * outs]
        activations = {"3B": 0.40e6, "7B": 0.55e6}[size]
    prompt = {"3B": 0.20e6, "7B": 0.30e6}[size] if config.model.adapter == "lora" else 0.30e6
    slots = config.rollout.slots  # prompts computed together; as many more keep their keys and values
    assert 2 * slots <= config.train.prompts_per_step and config.rollout.group_size == 1
    largest = max(sequence * activations, slots * config.prompts.max_prompt_tokens * prompt)
    passes = [largest, 2 * slots * sequence * per_token]
    return [term / 1e9 for term in [*model, *passes, 2**20 * config.objective.workspace_mib, 2**20 * caches]]


@pytest.mark.parametrize("name", FILES)
def test_the_memory_adds_up(name):
    size, card = FILES[name]
    lines = re.findall(r"^#   ? ?(\d+\.\d)  (.+)$", (FOLDER / name).read_text(encoding="utf-8"), re.MULTILINE)
    *terms, total = [float(number) for number, _ in lines]
    assert terms == pytest.approx(expected(size, load_config(FOLDER / name)), abs=0.051)
    assert total == pytest.approx(sum(terms), abs=0.01)
    assert lines[-1][1] == f"together, of {card * 2**30 / 1e9:.1f} ({card} GiB) less about 0.6 of CUDA's own"
    assert total + 0.6 < card * 2**30 / 1e9 - 1.5, "room for what the arithmetic does not see"


def test_the_cold_start_has_the_prompts_of_what_follows_it():
    cold, next_ = load_config(FOLDER / "cold_start.yaml"), load_config(FOLDER / "qwen2.5-omni-3b-24gb.yaml")
    assert cold.objective.kind == "sft" and cold.objective.teacher_view_fraction == 0
    assert (cold.prompts.system, cold.data.labels, cold.model.path) == (
        next_.prompts.system,
        next_.data.labels,
        next_.model.path,
    )


@pytest.mark.parametrize("name", ["cold_start.yaml", "qwen2.5-omni-3b.yaml", "qwen2.5-omni-3b-24gb.yaml"])
def test_the_settings_work_together(name, tmp_path):
    """Two steps of each kind of file on a small text model; labels and freeze are those of Omni."""
    text_job(tmp_path)
    words = [word for word in base_words(tmp_path) if not word.startswith(("optim.lr", "teacher.mu", "rollout.group"))]
    words += ["train.steps=2", "data.labels=null", "model.freeze=[]", "model.device=cpu"]
    run = train(load_config(FOLDER / name, words))
    assert [record["step"] for record in run.directory.read("metrics")] == [1, 2]
