"""A two-step job of a family: a tiny model of its real class, its real processor, rows with the media it takes."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

from opsd.config import Config, load_config
from tests.families import FAMILIES, build
from tests.files import tone, write_wav
from tests.omni_models import save_whole
from tests.processors import tokenizer, write_processor

MULTIMODAL = ("qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni_moe")
TEACHERS = {"image": "face-0.png", "audio": "voice-1.wav"}
TEXT = ("qwen2", "qwen3", "gemma3")  # the jobs of all other tests are Llama's


def save_model(folder: Path, name: str, whole: bool = False) -> None:
    """Model and processor files; whole: of an Omni checkpoint with its talker."""
    module = build(FAMILIES[name])
    with torch.no_grad():  # layers that matter beside the embeddings: a model that repeats a token hides mistakes
        module.get_input_embeddings().weight.mul_(0.05 if name == "gemma3" else 0.3)
    module.generation_config.eos_token_id = 2
    if whole:
        save_whole(folder, name, module)
    else:
        module.save_pretrained(folder)
    if name in MULTIMODAL:
        write_processor(folder, name)
    else:
        words = tokenizer({}, omni=False)
        words.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}:"
        words.save_pretrained(folder)


def write_rows(folder: Path, name: str) -> Path:
    """Three rows: every medium of the family, one of them, text alone."""
    media = FAMILIES[name].media
    for i, colour in enumerate([(200, 30, 30), (20, 60, 210)]):
        Image.new("RGB", (24, 24), colour).save(folder / f"face-{i}.png")
        # over a second: of a shorter sound Qwen3-Omni's convolutions see how far its batch is padded
        write_wav(folder / f"voice-{i}.wav", tone(16000, 250 + 200 * i, 1.1 + 0.2 * i))
    rows = []
    for i, kinds in enumerate((("image", "audio"), ("image",), ())):
        parts = [{"type": "text", "text": ("how does she feel", "what is it, then", "and now 0123")[i]}]
        parts += [{"type": "image", "image": f"face-{i}.png"}] if "image" in {*kinds} & {*media} else []
        parts += [{"type": "audio", "audio": f"voice-{i}.wav"}] if "audio" in {*kinds} & {*media} else []
        row = {"id": i, "prompt": [{"role": "user", "content": parts}], "rationale": f"cue {i}", "label": "sad"}
        if i == 1 and media:  # what only the teacher gets
            row["teacher_media"] = [{"type": kind, kind: file} for kind, file in TEACHERS.items() if kind in media]
        rows.append(row)
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def family_job(folder: Path, name: str, *words: str, whole: bool = False) -> Config:
    """Config of a 2-step run in folder/run."""
    if not (folder / "model").exists():
        folder.mkdir(exist_ok=True)
        save_model(folder / "model", name, whole)
        write_rows(folder, name)
    settings = [
        f"model.path={folder / 'model'}", f"data.train={folder / 'rows.jsonl'}", f"train.run_dir={folder / 'run'}",
        "train.steps=2", "train.prompts_per_step=3", "train.threads=1", "rollout.group_size=2",
        "rollout.max_new_tokens=5", "optim.lr=2e-3", "teacher.mu=0.9", "checkpoint.every=1", "checkpoint.keep=9",
        "log.progress=none", "prompts.teacher_template={rationale}",
    ]  # fmt: skip
    return load_config(None, [*settings, *words])
