"""Peak memory of a step's teacher and student passes, over the token budget and over G responses per prompt.

The peak is torch's own: the log of allocations on a CPU, max_memory_allocated on CUDA. What is counted lies above the
weights, the teacher's copy and the gradients.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from bench.engine_cases import Shape, Size, responses
from bench.engine_step import Job, opened
from bench.measure import peak_extra_bytes
from bench.results import Row
from opsd.group import Group, micro_batches
from opsd.metrics import Sums
from opsd.run import Run
from opsd.step import learn, teach

PROMPT, RESPONSE = 500, 100


def rows(size: Size, layers: int, prompt: int = PROMPT, response: int = RESPONSE) -> Iterator[Row]:
    """Budgets at one G, then G at one budget, then G without a budget, with and without shared prompts."""
    shape = Shape(prompt, prompt // 5, response, 8)
    pair = shape.prompt + shape.rationale + 2 * response  # a prompt and two responses
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), size, layers, shape)
        job.write()
        for budget in (pair, 2 * pair, 4 * pair):
            yield _row(job, shape, budget, shared=True)
        for group in (2, 4, 16):
            yield _row(job, replace(shape, group=group), pair, shared=True)
        for group in (2, 4, 8):
            for shared in (True, False):
                yield _row(job, replace(shape, group=group), 1 << 30, shared)


def _row(job: Job, shape: Shape, budget: int, shared: bool) -> Row:
    words = f"engine.token_budget={budget}", f"engine.share_prefix={str(shared).lower()}", "objective.workspace_mib=200"
    with opened(replace(job, shape=shape), *words) as run:
        peak = peak_of(run, shape)
    limit = "none" if budget == 1 << 30 else str(budget)
    way = "shared" if shared else "plain"
    return {"task": f"memory {shape}, budget {limit}, {way}", "extra_mib": peak / 2**20}


def peak_of(run: Run, shape: Shape) -> int:
    """Bytes of the passes over G given responses to the run's row."""
    example = run.rows(0)[0]
    answers = responses([shape.response] * shape.group, shape.group, run.model.head.weight.shape[0], run.model.device)
    views = [run.prompts.teacher(example)]
    texts = [""] * shape.group
    group = Group([example], [run.prompts.student(example)], views, answers, texts, {})

    def passes() -> None:
        sums = Sums()
        for part in micro_batches(run.config, group):
            learn(run, part, teach(run, part), sums).backward()

    for parameter in run.model.trainable().values():
        parameter.grad = torch.zeros_like(parameter)
    return peak_extra_bytes(passes, run.model.device.type)
