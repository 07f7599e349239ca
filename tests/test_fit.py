"""A step that runs out of memory, injected: done again in smaller passes, exactly, said, and once."""

from __future__ import annotations

import json

import pytest
import torch

import opsd.train
from opsd.config import Config
from opsd.errors import InputError
from opsd.fit import Budget, out_of_memory
from opsd.run import Run
from opsd.train import train
from tests.jobs import text_job

LORA = ("model.adapter=lora", "model.lora_r=4", "model.lora_dropout=0.3", "train.steps=3", "checkpoint.every=0")


class Full:
    """`learn` on a device that is full at the given passes, counted from 0 over the whole run."""

    def __init__(self, monkeypatch, *at: int, error: type[Exception] = torch.OutOfMemoryError):
        self.at, self.error, self.calls, self.sizes = at, error, 0, list[int]()
        self.learn = opsd.train.learn
        monkeypatch.setattr(opsd.train, "learn", self)

    def __call__(self, run, part, target, sums):
        call, self.calls = self.calls, self.calls + 1
        self.sizes.append(part.tokens)
        loss = self.learn(run, part, target, sums)
        torch.rand(3)  # what a pass draws beside dropout
        if call in self.at:
            raise self.error("CUDA out of memory")
        return loss


def weights(run: Run) -> list[torch.Tensor]:
    return [p.detach().clone() for p in run.model.trainable().values()]


def trained(config: Config, capsys) -> tuple[list[torch.Tensor], Run, str]:
    run = train(config)
    return weights(run), run, capsys.readouterr().out


def test_a_retried_step_is_that_of_half_the_budget_to_the_bit(tmp_path, monkeypatch, capsys):
    full = Full(monkeypatch, 1)  # the second pass of the first step: there are gradients already
    config = text_job(tmp_path, *LORA, "log.progress=plain")
    found, run, said = trained(config, capsys)
    largest = max(full.sizes[:2])
    assert run.budget.tokens == largest // 2, "half of the largest pass, not of a budget nothing filled"
    assert run.budget.retries == 1
    assert f"at most {largest // 2} tokens" in said
    assert [line["memory_retries"] for line in run.directory.read("metrics")] == [1, 1, 1]

    half = f"engine.token_budget={largest // 2}"
    monkeypatch.undo()
    Full(monkeypatch)
    again, other, _ = trained(text_job(tmp_path, *LORA, half, f"train.run_dir={tmp_path / 'half'}"), capsys)
    assert other.budget.retries == 0
    assert all(map(torch.equal, found, again))
    whole, *_ = trained(text_job(tmp_path, *LORA, f"train.run_dir={tmp_path / 'whole'}"), capsys)
    assert not all(map(torch.equal, found, whole)), "dropout of other passes is other dropout"
    losses = [[line["loss"] for line in one.directory.read("metrics")] for one in (run, other)]
    assert losses[0] == losses[1], "what the first attempt summed is not counted"


def test_a_resumed_run_keeps_the_smaller_budget(tmp_path, monkeypatch, capsys):
    words = ("checkpoint.every=1", "train.steps=2", "optim.schedule=constant")
    Full(monkeypatch, 0)
    run = train(text_job(tmp_path, *words))
    kept = json.loads((tmp_path / "run" / "passes.json").read_text())
    assert kept == {"token_budget": run.budget.tokens}
    monkeypatch.undo()
    resumed = train(text_job(tmp_path, "checkpoint.every=1", "train.steps=3", "optim.schedule=constant"), resume=True)
    assert resumed.budget.tokens == run.budget.tokens < 64


def test_a_resumed_run_keeps_what_its_rollouts_have_at_a_time(tmp_path):
    run = train(text_job(tmp_path, "train.steps=1"))
    run.budget.halve_rollouts(4, 20)
    resumed = train(text_job(tmp_path, "train.steps=2"), resume=True)
    assert (resumed.rollouts.slots, resumed.rollouts.tokens) == (2, 10)
    assert resumed.budget.tokens == run.budget.tokens > 10, "training has its own passes"
    run.budget.keep()
    kept = {"slots": 2, "prompt_tokens": 10, "token_budget": run.budget.tokens}
    assert json.loads((tmp_path / "run" / "passes.json").read_text()) == kept


def test_a_second_failure_ends_the_run_with_a_message(tmp_path, monkeypatch):
    Full(monkeypatch, 0, 1)
    with pytest.raises(InputError, match=r"engine.token_budget.*out of memory in passes of \d+ tokens, and of \d+"):
        train(text_job(tmp_path))


def test_a_pass_of_one_response_cannot_be_smaller(tmp_path, monkeypatch):
    full = Full(monkeypatch, 0)
    with pytest.raises(InputError, match="cannot be divided"):
        train(text_job(tmp_path, "engine.token_budget=1"))
    assert full.calls == 1


def test_other_errors_are_not_retried(tmp_path, monkeypatch):
    full = Full(monkeypatch, 0, error=RuntimeError)
    with pytest.raises(RuntimeError):
        train(text_job(tmp_path))
    assert full.calls == 1


def test_what_counts_as_out_of_memory():
    assert out_of_memory(torch.OutOfMemoryError("CUDA out of memory"))
    assert out_of_memory(MemoryError())
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 60, dtype=torch.uint8)
    assert out_of_memory(caught.value)
    assert not out_of_memory(RuntimeError("size mismatch"))


@pytest.mark.parametrize("text", ["{}", "[]", "7", "{", '{"token_budget": null}', '{"tokens": 3}'])
def test_a_damaged_file_is_named(tmp_path, text):
    (tmp_path / "passes.json").write_text(text)
    with pytest.raises(InputError, match=r"passes\.json"):
        Budget.of(64, tmp_path / "passes.json")
