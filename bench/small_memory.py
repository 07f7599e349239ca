"""What the two settings for small GPUs save, on a model of middling size.

    PYTHONPATH=.:kernels python -m bench.small_memory [bench/results/small-memory.json]

`optim.in_backward`: resident bytes of two steps at their highest as `bench.plan_memory` measures them, each case in a
process of its own, and their plan; milliseconds of the student's pass and the update, and torch's own log of what they
take above weights and moments (extra_mib).
`model.activation_checkpointing`: torch's own log of the teacher's and student's passes (`bench.engine_memory`). A CPU
has no second memory to move inputs to, so here a file that is mapped stands for the host: torch allocates none of it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.engine_cases import Shape, Size
from bench.engine_memory import peak_of
from bench.engine_step import Job, opened
from bench.measure import interleaved, peak_extra_bytes, summary
from bench.plan_memory import MIB, Case, asked, run_case
from bench.results import Row, environment
from opsd.group import Group
from opsd.offload import LayerInputs, offload
from opsd.run import Run
from opsd.step import sample
from opsd.train import gradients

MODULE = "bench.small_memory"
MIDDLE, SHAPE = Size(8, 768, 12, 4, 2048, 8192), Shape(120, 20, 30, 4)  # 57 million parameters
WORDS = (
    "teacher.kind=live",
    "engine.token_budget=4096",
    "objective.workspace_mib=16",
    "model.activation_checkpointing=true",
)
CASES = (
    Case("plain", MIDDLE, SHAPE, (*WORDS, "optim.max_grad_norm=1.0")),
    Case("in_backward, clip", MIDDLE, SHAPE, (*WORDS, "optim.max_grad_norm=1.0", "optim.in_backward=true")),
    Case("in_backward, no clip", MIDDLE, SHAPE, (*WORDS, "optim.max_grad_norm=null", "optim.in_backward=true")),
)
DEEP, LONG = Size(16, 256, 4, 2, 1024, 4096), Shape(700, 50, 80, 8)


class MappedFile:
    """A lane of opsd.offload to a file that is mapped into memory."""

    def __init__(self, folder: Path):
        self.folder, self.files = folder, 0

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        file, self.files = self.folder / f"{self.files}.bin", self.files + 1
        mapped = np.memmap(file, np.uint8, "w+", shape=x.nbytes)
        return torch.from_numpy(mapped).view(x.dtype).view(x.shape).copy_(x), None

    def back(self, kept: Tensor) -> tuple[Tensor, Any]:
        return kept.clone(), None

    def wait(self, done: Any) -> None: ...


def updates() -> Iterator[Row]:
    """Milliseconds of the student's pass and the update, one of each case in turn; and by torch's log what they take
    above weights and moments."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        job = Job(Path(folder), MIDDLE, MIDDLE.layers, SHAPE)
        job.write()
        steps = {}
        for case in CASES:
            run = stack.enter_context(opened(job, *case.words))
            steps[case.name] = partial(_update, run, sample(run, run.rows(0), 0))
        interleaved(steps, 1)
        times = interleaved(steps, 5)
        for name, step in steps.items():
            yield summary(times[name]) | {"extra_mib": peak_extra_bytes(step, "cpu") / MIB}


def _update(run: Run, group: Group) -> None:
    gradients(run, group, 0)
    run.optimizer.step(0)


def checkpointed() -> Iterator[Row]:
    """Peaks of the passes without checkpointing, with it, and with its inputs elsewhere."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        job = Job(Path(folder), DEEP, DEEP.layers, LONG)
        job.write()
        for value in ("false", "true", "offload"):
            words = f"model.activation_checkpointing={value}", "model.adapter=lora", "engine.token_budget=4096"
            with opened(job, *words, "objective.workspace_mib=16") as run:
                inputs = LayerInputs(MappedFile(Path(folder)))
                if value == "offload":
                    offload(run.model.module, inputs)
                peak = peak_of(run, LONG) / MIB
                yield {
                    "case": f"activation_checkpointing={value}",
                    "extra_mib": peak,
                    "copied_mib": inputs.copied / MIB,
                    "fetched_mib": inputs.fetched / MIB,
                }


def main() -> None:
    out = asked(MODULE, "What the two settings for small GPUs save.", CASES)
    found = [run_case(MODULE, number) | more for number, more in enumerate(updates())]
    found += checkpointed()
    for row in found:
        print(row)
    if out is not None:
        out.write_text(json.dumps({**environment(), "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
