"""The embedded job: its clips and its cold-started model, made once and kept, and the config that trains on them.

    CACHE/embedded-KEY/data/     train, validation, test: JSONL, clips/*.avi
    CACHE/embedded-KEY/model/    the cold-started thinker: a folder plain transformers opens

KEY is a hash of the sources, settings and seed that determine the folder. The clips are the same for every seed; the
model's initial weights and its cold start follow `train.seed`. The folder is built beside its place and renamed into
it, so a run killed half-way leaves no half cache.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from opsd.affect.clips import TEST, TRAIN, VALIDATION, every_text, write_split
from opsd.affect.tiny import TinySize, build
from opsd.config import Config, PromptsConfig, load_config, read_yaml
from opsd.errors import InputError, writing

HERE: Final = Path(__file__).parent
CACHE: Final = Path("runs/cache")
SIZES: Final = {TRAIN: 1536, VALIDATION: 96, TEST: 384}  # clips
DATA_SEED: Final = 0
LABEL_EVERY: Final = 19  # prime to the six labels, which take turns
OTHERS_EVERY: Final = 2


def prepare(words: Sequence[str], train: Callable[[Config], Any], cache: Path = CACHE) -> Config:
    """The config of the embedded job with the overrides `words`; builds data and model where they are not cached.

    train: the trainer, which also runs the cold start.
    """
    _check_own(words)
    base = {**read_yaml(HERE / "embedded.yaml")[0], "model": {"path": "."}}
    seed = load_config(None, words, base).train.seed  # a mistake in `words` is told before anything is built
    folder = (cache / f"embedded-{_key(seed)}").absolute()
    base["model"] = {"path": str(folder / "model")}
    base["data"] |= {split.name: str(folder / "data" / f"{split.name}.jsonl") for split in (TRAIN, TEST)}
    config = load_config(None, words, base)
    with _lock(folder):
        if not folder.exists():
            print("first run: drawing clips and cold-starting a small model, once", flush=True)
            _build(folder, train, seed)
    return config


def _check_own(words: Sequence[str]) -> None:
    """Rows or a model of the user's are not to be trained with this job's settings."""
    for key in (word.partition("=")[0] for word in words):
        if key in ("model.path", "data.train", "data.validation", "data.test"):
            raise InputError(
                "a config file", f"{key} alone", file="command line", field=key,
                hint="without a config file the embedded job runs, on its own rows and model; examples/ has configs",
            )  # fmt: skip


def _cold_start_rows(rows: Path, label_template: str) -> Path:
    """The training rows, changed so that the model learns to read rather than to look and listen.

    Every OTHERS_EVERY-th has the video of the next row: its rationale and answer can only be read. Every LABEL_EVERY-th
    has the bare label for a rationale, so that the model can read one too, or the arm label-only of `opsd.ablate` would
    have a teacher that learns nothing from what it sees.
    """
    lines = [json.loads(line) for line in rows.read_text(encoding="utf-8").splitlines()]
    videos = [row["prompt"] for row in lines]
    for row, prompt in zip(lines[::OTHERS_EVERY], [*videos[1:], videos[0]][::OTHERS_EVERY], strict=True):
        row["prompt"] = prompt
    for row in lines[::LABEL_EVERY]:
        row["rationale"] = label_template.replace("{label}", row["label"])
    path = rows.with_name("cold_start.jsonl")
    path.write_text("".join(json.dumps(row) + "\n" for row in lines), encoding="utf-8")
    return path


def _build(folder: Path, train: Callable[[Config], Any], seed: int) -> None:
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        for split, size in SIZES.items():
            write_split(temporary / "data", split, DATA_SEED, size)
        build(temporary / "start", vocabulary(), TinySize(), seed)
        run_dir = temporary / "cold_start"
        train(_cold_start(temporary, run_dir, seed))
        checkpoint = (run_dir / "checkpoints" / "last").resolve()
        for name in ("trainer.safetensors", "trainer.json", "manifest.json"):  # of no use once the cold start is over
            (checkpoint / name).unlink()
        os.replace(checkpoint, temporary / "model")
        shutil.rmtree(run_dir / "checkpoints")
        shutil.rmtree(temporary / "start")
        os.replace(temporary, folder)


def _cold_start(folder: Path, run_dir: Path, seed: int) -> Config:
    base = {**read_yaml(HERE / "cold_start.yaml")[0], "model": {"path": str(folder / "start")}}
    rows = _cold_start_rows(folder / "data" / "train.jsonl", PromptsConfig().label_template)
    base["data"]["train"] = str(rows)
    base["train"] |= {"run_dir": str(run_dir), "seed": seed}
    return load_config(None, (), base)


def vocabulary() -> list[str]:
    """Every text a prompt or an answer of the job can hold."""
    prompts = PromptsConfig()
    return [*every_text(), prompts.teacher_template, prompts.label_template, prompts.subtitle_template or ""]


def _key(seed: int) -> str:
    digest = hashlib.sha256()
    for path in sorted([*HERE.glob("*.py"), HERE / "cold_start.yaml"]):
        digest.update(path.read_bytes())
    digest.update("\0".join([*vocabulary(), str(seed)]).encode())
    return digest.hexdigest()[:12]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Two first runs at once: the second waits for the first. The system lets go of the lock of a killed run."""
    path = folder.parent / ".lock"
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
