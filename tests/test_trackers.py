"""Trackers hear what the JSONL files hold. The libraries are stood in for: what they are told is what is judged."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from opsd import trackers
from opsd.errors import InputError
from opsd.opening import open_run
from opsd.train import train
from tests.jobs import text_job


class Stand:
    """tensorboard, wandb and trackio at once: keeps what it was told."""

    def __init__(self):
        self.begun, self.heard, self.closed = {}, [], 0

    def SummaryWriter(self, path):
        self.begun = {"path": path}
        return SimpleNamespace(
            add_scalar=lambda name, value, step: self.heard.append((step, {name: value})),
            flush=lambda: None,
            close=self.finish,
        )

    def init(self, **options):
        self.begun = options
        return SimpleNamespace(log=self.log, finish=self.finish, define_metric=lambda *a, **k: None)

    def log(self, values, step=None):
        self.heard.append((values["step"] if step is None else step, values))

    def finish(self):
        self.closed += 1


@pytest.fixture(params=["tensorboard", "wandb", "trackio"])
def stand(request, monkeypatch):
    made = Stand()
    module = "torch.utils.tensorboard" if request.param == "tensorboard" else request.param
    monkeypatch.setitem(sys.modules, module, made)
    made.name = request.param
    return made


def test_a_tracker_hears_every_number_of_the_run(tmp_path, stand):
    config = text_job(tmp_path, f"log.to=[{stand.name}]", "log.project=faces")
    run_dir = train(config).directory.path
    heard: dict[str, dict[int, float]] = {}
    for step, values in stand.heard:
        for name, value in values.items():
            heard.setdefault(name, {})[step] = value
    heard.pop("step", None)
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    for name in lines[0].keys() - {"step"}:
        assert heard.pop(f"train/{name}") == {line["step"]: line[name] for line in lines}
    for line in map(json.loads, (run_dir / "evaluations.jsonl").read_text().splitlines()):
        assert heard[f"evaluate/test-{line['view']}/accuracy"][line["step"]] == line["accuracy"]
    assert all(name.startswith("evaluate/") for name in heard)
    assert stand.closed == 1
    if stand.name != "tensorboard":
        assert stand.begun["project"] == "faces"
        assert stand.begun["name"] == "run"
        assert stand.begun["config"]["optim"]["lr"] == 1e-3
        assert stand.begun["resume"] == "allow"


def test_a_resumed_run_is_the_same_run_to_wandb(tmp_path, stand):
    if stand.name != "wandb":
        pytest.skip("its name or folder says it for the others")
    config = text_job(tmp_path, "log.to=[wandb]", "train.steps=2")
    train(config)
    first = stand.begun["id"]
    train(config, resume=True)
    assert stand.begun["id"] == first


def test_a_tracker_that_fails_is_given_up_and_the_run_goes_on(tmp_path, stand, caplog):
    def broken(*_, **__):
        raise ConnectionError("nobody there")

    stand.log = stand.SummaryWriter = broken
    if stand.name == "tensorboard":
        with pytest.raises(InputError, match=r"log\.to.*tensorboard to begin.*nobody there"):
            train(text_job(tmp_path, "log.to=[tensorboard]"))
        return
    with caplog.at_level("INFO", "opsd"):
        run = train(text_job(tmp_path, f"log.to=[{stand.name}]"))
    assert len(run.directory.read("metrics")) == 4
    assert sum("nobody there" in line for line in caplog.messages) == 1


def test_a_tracker_that_is_not_installed_is_told_first(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "trackio", None)
    config = text_job(tmp_path, "log.to=[trackio]")
    with pytest.raises(InputError, match=r"log\.to.*trackio to be installed.*pip install trackio"), open_run(config):
        pass
    assert not config.train.run_dir.exists()


def test_texts_and_answers_go_nowhere():
    assert trackers.scalars("samples", {"step": 1, "response": "sad"}) == {}
    assert trackers.scalars("answers", {"step": 1, "right": True}) == {}
    assert trackers.scalars("metrics", {"step": 1, "loss": 2, "kind": "x", "on": True}) == {"train/loss": 2.0}
