"""A base in four bits: one set of codes for student, teacher and rollout, untouched, and equal to transformers'."""

from __future__ import annotations

import shutil
import sys
from importlib.util import find_spec

import pytest
import torch
import transformers

from opsd.affect.tiny import TinySize, build
from opsd.config import load_config
from opsd.data import read_examples
from opsd.engine import response_hidden
from opsd.errors import InputError
from opsd.export import export, main
from opsd.four_bit import is_coded, scales
from opsd.loading import load_model
from opsd.parts import what_trains
from opsd.plan.names import WEIGHTS
from opsd.plan.outline import outline
from opsd.plan.plan import make_plan
from opsd.plan.workload import Longest, Workload
from opsd.prompts import PromptBuilder
from opsd.rollout import rollout
from opsd.run_dirs import with_run_dir
from opsd.sampling import Sampling
from opsd.teacher import build_teacher, score
from opsd.train import train
from tests.jobs import text_job
from tests.test_resume import assert_same

pytestmark = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")

WORDS = ("model.adapter=lora", "model.quantize=nf4", "teacher.kind=frozen", "optim.lr=1e-2")
IDS = torch.tensor([[5, 6, 7, 8, 9]])
NAME = "model.layers.1.mlp.up_proj.weight"


def job(folder, *words):
    """Of a model wide enough for codes: rows of 64 and of 128 weights."""
    return text_job(folder, *WORDS, *words, hidden_size=64, intermediate_size=128)


def codes_of(module) -> dict[str, torch.Tensor]:
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    layers = {name.replace(".base_layer", ""): child for name, child in base.named_modules() if is_coded(child)}
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def theirs(path):
    """transformers' own 4-bit model of the same folder."""
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": torch.float32}
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, **nf4)
    cls = transformers.AutoModelForCausalLM
    return cls.from_pretrained(path, quantization_config=quantization, device_map={"": "cpu"}).eval()


def adapted(config):
    """The model of a config with an adapter that does something."""
    model = load_model(config.model, engine=config.engine)
    torch.manual_seed(3)
    for name, p in model.module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.1)
    return model


@pytest.fixture
def setting(tmp_path):
    config = job(tmp_path)
    model = adapted(config)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    rows = read_examples(config.data.train, config.data)[:3]
    prompts = [builder.student(row) for row in rows], [builder.teacher(row) for row in rows]
    return config, model, *prompts


@torch.no_grad()
def test_codes_and_logits_are_those_of_transformers(setting):
    config, model, *_ = setting
    other = theirs(config.model.path)
    ours, reference = codes_of(model.module), codes_of(other)
    assert ours.keys() == reference.keys() and len(ours) == 14, "seven layers of two"
    assert all(torch.equal(ours[name], reference[name]) for name in ours)
    with model.module.disable_adapter():
        torch.testing.assert_close(model.module(input_ids=IDS).logits, other(input_ids=IDS).logits)
    exact = transformers.AutoModelForCausalLM.from_pretrained(config.model.path)
    assert (other(IDS).logits - exact(IDS).logits).norm() > 0.01 * exact(IDS).logits.norm(), "codes, not the weights"
    assert torch.equal(model.head.weight, exact.get_output_embeddings().weight), "the head is exact"


def test_packed_and_plain_are_the_same_states_and_gradients(setting):
    _, model, prompts, _ = setting
    responses = rollout(model, prompts, Sampling(group_size=3, max_new_tokens=7, temperature=1.0), [1, 2, 3])
    found = []
    for shared in (True, False):
        hidden = response_hidden(model, prompts, responses, shared)
        model.module.zero_grad()
        (hidden * torch.linspace(-1, 1, hidden.shape[-1])).sum().backward()
        found.append([hidden.detach(), *(p.grad for p in model.trainable().values())])
    assert len(found[0]) == 1 + 2 * 14
    for packed, plain in zip(*found, strict=True):
        torch.testing.assert_close(packed, plain, rtol=1e-4, atol=1e-5 * float(plain.abs().max()))


@torch.no_grad()
def test_a_greedy_rollout_is_transformers_generate(setting):
    _, model, prompts, _ = setting
    responses = rollout(model, prompts, Sampling.greedy(8), [0, 0, 0])
    for prompt, tokens, length in zip(prompts, responses.tokens.tolist(), responses.lengths, strict=True):
        ids = prompt.inputs["input_ids"]
        want = model.module.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False,
            eos_token_id=model.end_ids, suppress_tokens=model.suppressed_ids,
        )[0, ids.shape[1] :]  # fmt: skip
        assert tokens[:length] == want.tolist()[:length]


@torch.no_grad()
def test_a_frozen_teacher_is_the_base_in_four_bits(setting):
    config, model, prompts, views = setting
    responses = rollout(model, prompts, Sampling(group_size=2, max_new_tokens=6, temperature=1.0), [1, 2, 3])
    hidden, head = score(build_teacher(config.teacher, model), model, views, responses)
    assert head is None
    other, at = theirs(config.model.path), 0
    for owner, tokens, length in zip(responses.owners, responses.tokens, responses.lengths, strict=True):
        ids = torch.cat([views[owner].inputs["input_ids"][0], tokens[:length]])[None]
        start = ids.shape[1] - length - 1
        want = other.model(ids).last_hidden_state[0, start : start + length]
        torch.testing.assert_close(hidden[at : at + length], want, rtol=1e-4, atol=1e-5)
        at += length


@pytest.mark.parametrize("average", ["dense", "freeze_a"])
def test_a_moving_teacher_moves_on_the_same_codes(tmp_path, average):
    config = job(tmp_path, "teacher.kind=ema", "teacher.mu=0.5", f"teacher.lora_average={average}")
    run = train(config)
    assert all(line["divergence"] > 0 for line in run.directory.read("metrics")[1:])


def test_training_leaves_the_codes_alone_and_resumes_to_the_bit(tmp_path):
    whole = job(tmp_path, "checkpoint.keep=9")
    before = codes_of(load_model(whole.model).module)
    run = train(whole)
    after = codes_of(run.model.module)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert all(float(p.detach().norm()) > 0 for name, p in run.model.trainable().items() if "lora_B" in name)
    cut = tmp_path / "cut"
    shutil.copytree(whole.train.run_dir, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    train(with_run_dir(whole, cut), resume=True)
    assert_same(cut, whole.train.run_dir)


def test_an_export_says_what_four_bits_cost(tmp_path, capsys):
    config = job(tmp_path, "train.steps=2")
    run = train(config)
    assert main([str(config.train.run_dir), str(tmp_path / "refused")]) == 2
    assert "--dequantize" in capsys.readouterr().err and not (tmp_path / "refused").exists()
    said = export(config.train.run_dir, tmp_path / "out", dequantize=True)
    assert "% of a layer's norm" in said and 5 < float(said.split("up to ")[1].split("%")[0]) < 15
    out = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert not codes_of(out) and not hasattr(out.config, "quantization_config")
    with torch.no_grad():
        want = run.model.module(input_ids=IDS).logits
        torch.testing.assert_close(out(IDS).logits, want, rtol=1e-4, atol=1e-4)
        with run.model.module.disable_adapter():
            assert (run.model.module(input_ids=IDS).logits - want).abs().max() > 1e-3
    plain = text_job(tmp_path, "model.adapter=lora", "train.steps=1", f"train.run_dir={tmp_path / 'plain'}")
    train(plain)
    with pytest.raises(InputError, match=r"--dequantize.*four bits"):
        export(plain.train.run_dir, tmp_path / "other", dequantize=True)


def test_the_plan_counts_codes_and_scales(tmp_path):
    config = job(tmp_path)
    model = load_model(config.model)
    base = model.module.get_base_model()
    weights = [x for name, x in base.named_parameters() if ".lora_" not in name]
    real = sum(-(-x.nbytes // 64) * 64 for x in (*weights, *base.buffers(), *scales(base)))
    shapes = outline(config.model, config.engine, None, cuda=False)
    drawn = [(x.shape, x.dtype) for x in scales(shapes.module.get_base_model())]
    assert drawn == [(x.shape, x.dtype) for x in scales(base)]
    plan = make_plan(config, shapes, Workload.of(config, Longest(40, 60, rows=3)), cuda=False, memory=1 << 40)
    assert plan.phases["student"][WEIGHTS] == real
    plain = load_model(config.model.model_copy(update={"quantize": "none"}))
    assert what_trains(model.module) == what_trains(shapes.module) == what_trains(plain.module), "weights, not bytes"


def test_only_the_language_is_in_four_bits(tmp_path):
    """Towers and projectors keep their weights, and may have adapters of their own; a frozen part gets none."""
    build(tmp_path / "omni", ["the face is low"], TinySize(), 0)
    words = [f"model.path={tmp_path / 'omni'}", *WORDS[:2]]
    config = load_config(None, [*words, "model.lora_targets={language: [q_proj], vision: [proj]}"])
    base = load_model(config.model).module.get_base_model()
    coded = set(codes_of(base))
    assert len(coded) == 14 and all(name.startswith("model.layers.") for name in coded)
    adapters = {name.split(".")[0] for name, p in base.named_parameters() if p.requires_grad}
    assert adapters == {"model", "visual"}
    frozen = load_config(None, [*words, "model.freeze=[language]"])
    with pytest.raises(InputError, match=r"model\.freeze"):
        load_model(frozen.model)


def test_codes_are_never_laid_out_anew(tmp_path, monkeypatch):
    """As bitsandbytes does it in evaluation on a CPU with bf16 instructions: gradients would end there."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: True)
    layers = [layer for layer in load_model(job(tmp_path).model).module.modules() if is_coded(layer)]
    assert layers and not any(layer.support_avx512bf16_for_cpu for layer in layers)


def test_layers_that_bitsandbytes_misreads_keep_their_weights(tmp_path):
    narrow = text_job(tmp_path, *WORDS)  # rows of 32, but for down_proj's 64
    assert {name.rpartition(".")[2] for name in codes_of(load_model(narrow.model).module)} == {"down_proj"}
    none = text_job(tmp_path / "none", *WORDS, intermediate_size=48)
    with pytest.raises(InputError, match=r"model\.quantize.*64"):
        load_model(none.model)


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    for words in (["model.quantize=nf4"], ["model.quantize=nf4", "model.adapter=lora", "train.parallel=fsdp"]):
        with pytest.raises(InputError, match=r"model\.quantize"):
            load_config(None, ["model.path=x", *words])
    config = job(tmp_path)
    with pytest.raises(InputError, match=r"model\.device.*'?nowhere"):
        load_model(job(tmp_path, "model.device=nowhere").model)
    theirs(config.model.path).save_pretrained(tmp_path / "codes")
    again = job(tmp_path, f"model.path={tmp_path / 'codes'}")
    with pytest.raises(InputError, match=r"model\.quantize.*already"):
        load_model(again.model)
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"model\.quantize.*opsd-trainer\[quant\]"):
        load_model(config.model)
