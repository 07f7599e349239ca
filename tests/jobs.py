"""A small text job for tests: rows, a tiny model and the config that trains it."""

from __future__ import annotations

import json
from pathlib import Path

from opsd.config import Config, load_config
from tests.models import save_text_model

LABELS = ("sad", "happy", "angry")


def write_rows(path: Path, n: int = 7) -> Path:
    rows = []
    for i in range(n):
        label = LABELS[i % 3]
        rows.append(
            {
                "id": f"row-{i}",
                "prompt": "the clip shows " + " ".join(["a face", "low", "high voice"][: i % 3 + 1]),
                "rationale": " ".join(["the voice is low", "the face is high"][: i % 2 + 1]),
                "label": label,
                "answer": f"<think> the voice is {label} </think> <answer> {label} </answer>",
            }
        )
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def text_job(folder: Path, *words: str, **model: object) -> Config:
    """Config of a 4-step run in folder/run; the model and rows are made where they are missing."""
    if not (folder / "model").exists():
        save_text_model(folder / "model", **model)  # type: ignore[arg-type]
        write_rows(folder / "rows.jsonl")
    return load_config(None, [*base_words(folder), *words])


def base_words(folder: Path) -> list[str]:
    return [
        f"model.path={folder / 'model'}",
        f"data.train={folder / 'rows.jsonl'}",
        f"data.test={folder / 'rows.jsonl'}",
        f"train.run_dir={folder / 'run'}",
        "train.steps=4",
        "train.prompts_per_step=4",
        "train.threads=1",
        "engine.token_budget=64",
        "rollout.group_size=3",
        "rollout.max_new_tokens=8",
        "optim.lr=1e-3",
        "teacher.mu=0.9",
        "checkpoint.every=2",
        "log.progress=none",
    ]
