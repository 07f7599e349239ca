"""Which checkpoint of a finished run answers."""

from __future__ import annotations

import pytest

import opsd.train
from opsd.answers import finished_run
from opsd.errors import InputError
from tests.jobs import text_job


def test_the_newest_or_the_best(tmp_path, monkeypatch):
    words = [f"data.validation={tmp_path / 'rows.jsonl'}", "evaluate.every=1", "checkpoint.best=accuracy",
             "checkpoint.keep=9", "checkpoint.every=1", "train.steps=2", "evaluate.teacher=false"]  # fmt: skip
    monkeypatch.setattr("opsd.saving._score", lambda run, step: {1: 0.9}.get(step, 0.1))
    run = opsd.train.train(text_job(tmp_path, *words)).directory.path
    assert [finished_run(run, best)[1].name for best in (False, True)] == ["step-000002", "step-000001"]
    (run / "checkpoints" / "step-000001" / "trainer.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match="an intact checkpoint"):
        finished_run(run, best=True)


def test_a_run_that_kept_no_best_is_told(tmp_path):
    run = opsd.train.train(text_job(tmp_path, "train.steps=1")).directory.path
    with pytest.raises(InputError, match=r"checkpoint.best=accuracy or loss"):
        finished_run(run, best=True)
