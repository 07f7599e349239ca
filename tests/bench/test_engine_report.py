"""The report of the engine at tiny sizes: gates that can fail, rows kept once, memory that follows the budget."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from bench import engine_memory, engine_report, engine_step, engine_tasks
from bench.engine_cases import TINY, Shape, language_model
from bench.engine_report import keep, line, measure

SHAPE = Shape(12, 8, 5, 3)
TASKS = [replace(task, shape=SHAPE) for task in engine_tasks.TASKS[1:5]]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_every_task_passes_its_gate_and_gives_a_row(task):
    row = measure(task, language_model(TINY), rounds=2)
    assert row["ratio"] > 0 and len(row["rounds"]) == 2
    assert str(task) in line(row)


def test_a_wrong_engine_is_not_timed(monkeypatch):
    right = engine_tasks.response_hidden

    def off(model, prompts, responses, share_prefix=True):
        return right(model, prompts, responses, share_prefix) * (1.01 if share_prefix else 1.0)

    monkeypatch.setattr(engine_tasks, "response_hidden", off)
    with pytest.raises(AssertionError, match="off by"):
        measure(TASKS[0], language_model(TINY), rounds=1)


@pytest.mark.parametrize("peer", [engine_step._reproduction, engine_step._trl], ids=["reproduction", "trl"])
def test_our_loss_is_the_peers(tmp_path, peer):
    if peer is engine_step._trl:
        pytest.importorskip("trl")
    job = engine_step.Job(tmp_path, TINY, 2, SHAPE)
    job.write()
    step, sampled = peer(job)
    with engine_step.opened(job) as run:
        tokens, loss = sampled()
        assert tokens.shape == (SHAPE.group, SHAPE.response)
        torch.testing.assert_close(engine_step.loss_of(run, tokens), loss, rtol=1e-4, atol=0)
        step()
        assert torch.isfinite(engine_step.step(run))


def test_the_peak_follows_the_budget_and_not_the_group():
    rows = list(engine_memory.rows(TINY, 2, prompt=200, response=20))
    mib = {row["task"].removeprefix("memory 200/40/20/"): row["extra_mib"] for row in rows}
    assert mib["16, budget 280, shared"] < 1.02 * mib["2, budget 280, shared"]
    assert mib["8, budget none, plain"] > 2 * mib["8, budget none, shared"]


def test_a_row_takes_the_place_of_an_older_one(tmp_path):
    pytest.importorskip("matplotlib")
    timings = {"opsd": {"ms": 1.0}, "plain": {"ms": 2.0}}
    row = {"task": "a", "layers": 2, "ratio": 2.0, "target": 1.5, "timings": timings, "rounds": [2.0]}
    keep(tmp_path / "r.json", [row])
    keep(tmp_path / "r.json", [{**row, "ratio": 3.0}, {**row, "layers": 4}])
    found = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert [(r["layers"], r["ratio"]) for r in found] == [(2, 3.0), (4, 2.0)]
    assert (tmp_path / "r.png").stat().st_size > 1000


def test_the_gpu_report_has_the_engine():
    from bench.gpu_report import SECTIONS

    assert engine_report.section in [section.rows for section in SECTIONS]
