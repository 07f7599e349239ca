"""The cache of the embedded job: made once, never half, and the config that points at it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opsd.affect import embedded
from opsd.affect.cues import LABELS
from opsd.config import Config
from opsd.errors import InputError


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "SIZES", dict.fromkeys(embedded.SIZES, 6))


class Trainer:
    """Stands in for `opsd.train.train`: remembers what it was asked, and leaves a checkpoint."""

    def __init__(self) -> None:
        self.asked: list[Config] = []

    def __call__(self, config: Config) -> Any:
        self.asked.append(config)
        assert config.train.run_dir is not None
        checkpoints = config.train.run_dir / "checkpoints"
        (checkpoints / "step-1").mkdir(parents=True)
        for name in ("model.safetensors", "trainer.safetensors", "trainer.json", "manifest.json"):
            (checkpoints / "step-1" / name).write_text(name)
        (checkpoints / "last").symlink_to("step-1")


def test_built_once_then_found(tmp_path: Path) -> None:
    trainer = Trainer()
    first = embedded.prepare([], trainer, tmp_path)
    second = embedded.prepare(["train.steps=1"], trainer, tmp_path)
    assert len(trainer.asked) == 1
    cold = trainer.asked[0]
    assert cold.objective.kind == "sft" and cold.objective.teacher_view_fraction > 0.5
    assert cold.data.labels == LABELS and cold.data.test is None

    assert first.objective.kind == "distill" and second.train.steps == 1
    assert first.model == second.model and first.data == second.data
    model = Path(first.model.path)
    assert [path.name for path in model.iterdir()] == ["model.safetensors"]
    assert first.data.train and first.data.test and first.data.train.is_file() and first.data.test.is_file()
    assert {path.name for path in model.parent.iterdir()} == {"cold_start", "data", "model"}
    assert [path.name for path in tmp_path.iterdir() if not path.name.startswith(".")] == [model.parent.name]


def test_another_seed_is_another_cold_start_on_the_same_clips(tmp_path: Path) -> None:
    trainer = Trainer()
    first, second = (embedded.prepare([f"train.seed={seed}"], trainer, tmp_path) for seed in (0, 1))
    assert [cold.train.seed for cold in trainer.asked] == [0, 1]
    assert first.model.path != second.model.path
    assert first.data.test and second.data.test
    assert first.data.test.read_bytes() == second.data.test.read_bytes()


def test_a_killed_build_leaves_nothing_that_is_used(tmp_path: Path) -> None:
    def killed(config: Config) -> None:
        assert config.train.run_dir is not None
        config.train.run_dir.mkdir()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        embedded.prepare([], killed, tmp_path)
    assert not [path for path in tmp_path.iterdir() if not path.name.startswith(".")]
    trainer = Trainer()
    assert Path(embedded.prepare([], trainer, tmp_path).model.path).is_dir() and len(trainer.asked) == 1


def test_a_mistake_is_told_before_anything_is_built(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="steps"):
        embedded.prepare(["train.step=3"], Trainer(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("word", ["data.train=mine.jsonl", "data.test=mine.jsonl", "model.path=mine"])
def test_rows_and_models_of_a_user_want_a_config_file(tmp_path: Path, word: str) -> None:
    with pytest.raises(InputError, match="expected a config file"):
        embedded.prepare([word, "train.steps=3"], Trainer(), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_the_key_follows_what_determines_the_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    key = embedded._key(0)
    assert key == embedded._key(0) != embedded._key(1)
    monkeypatch.setattr(embedded, "vocabulary", lambda: ["another"])
    assert embedded._key(0) != key


def test_some_rows_of_the_cold_start_can_only_be_read(tmp_path: Path) -> None:
    """Another clip's video, or a bare label; every other row is the training row as it is."""
    trainer = Trainer()
    config = embedded.prepare([], trainer, tmp_path)
    assert config.data.train is not None
    train, cold = (
        [json.loads(line) for line in (config.data.train.parent / f"{name}.jsonl").read_text().splitlines()]
        for name in ("train", "cold_start")
    )
    assert len(train) == len(cold) == 6
    for i, (row, read) in enumerate(zip(train, cold, strict=True)):
        assert read["prompt"] == (train[(i + 1) % 6] if i % embedded.OTHERS_EVERY == 0 else row)["prompt"]
        assert row["answer"] == read["answer"] and row["subtitle"] == read["subtitle"]
        assert (read["rationale"] == row["rationale"]) == (i % embedded.LABEL_EVERY > 0)
    assert row["label"] != train[0]["label"] and f"is: {cold[0]['label']}" in cold[0]["rationale"]
