"""The training objective on held-out rows: what `checkpoint.best: loss` goes by."""

from __future__ import annotations

import torch

from opsd.data import Example
from opsd.group import micro_batches
from opsd.metrics import Sums
from opsd.run import Run
from opsd.step import learn, responses_per_step, sample, teach

_READ = ("loss", "responses")


@torch.no_grad()
def held_out_loss(run: Run, rows: list[Example], step: int) -> float:
    """Mean over rows of the loss per token: of the student's greedy answers, or for `sft` of the rows' own.

    The steps' own parts compute it, without dropout. A teacher that moves makes it a measure that moves.
    rows: this process's share of them, which may be none.
    """
    sums, size = Sums(), run.config.evaluate.batch_size
    for some in (rows[first : first + size] for first in range(0, len(rows), size)):
        for part in micro_batches(run.config, sample(run, some, step, greedy=True), run.budget.tokens):
            learn(run, part, teach(run, part), sums, train=False)
    values = run.world.sum({"loss": 0.0, "responses": 0.0} | {n: v for n, v in sums.read().items() if n in _READ})
    return values["loss"] * responses_per_step(run.config) / values["responses"]
