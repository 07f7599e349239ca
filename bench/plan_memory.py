"""What `--dry-run` says against what two steps of training take, each case in a process of its own.

    PYTHONPATH=.:kernels python -m bench.plan_memory [bench/results/plan-cpu.json]

On a CPU the resident bytes of the process at their highest, above those it has before the model is read (after two
steps of a tiny one, so that libraries are loaded) and those of its tokenizer, which is loaded once more to be weighed.
On CUDA torch.cuda.max_memory_allocated.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path

import torch
from transformers import AutoTokenizer

from bench.engine_cases import TINY, Shape, Size
from bench.engine_step import Job, opened
from bench.results import Row, environment
from opsd.plan.outline import outline
from opsd.plan.plan import make_plan
from opsd.plan.workload import Longest, Workload
from opsd.run import Run
from opsd.step import sample
from opsd.train import gradients

MIB, MODULE = 1 << 20, "bench.plan_memory"


@dataclass(frozen=True)
class Case:
    name: str
    size: Size
    shape: Shape
    words: tuple[str, ...]


NARROW, WIDE = Size(6, 256, 4, 2, 1024, 4096), Size(4, 768, 12, 4, 2048, 16384)
CASES = (
    Case("adapter, long passes", NARROW, Shape(1400, 100, 150, 8), ("model.adapter=lora", "engine.token_budget=4096")),
    Case(
        "adapter, checkpointing, large workspace",
        Size(12, 256, 4, 2, 1024, 65536),
        Shape(1400, 100, 80, 8),
        ("model.adapter=lora", "model.activation_checkpointing=true", "engine.token_budget=4096"),
    ),
    Case("all weights, EMA teacher", WIDE, Shape(120, 20, 30, 4), ("teacher.kind=ema", "engine.token_budget=200")),
)


def measured(case: Case) -> Row:
    """In this process, which has to be new: bytes of two steps, and of their plan."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as small, tempfile.TemporaryDirectory() as folder:
        _train(Job(Path(small), TINY, TINY.layers, Shape(20, 5, 4, 2)), case.words)
        job = Job(Path(folder), case.size, case.size.layers, case.shape)
        _write(job)
        start = _begin()
        spare = AutoTokenizer.from_pretrained(job.folder / "model")
        start += 2 * (_begin() - start)  # this one, and the run's
        config = _train(job, case.words).config
        peak = _peak() - start
        del spare
        longest = Longest(case.shape.prompt, case.shape.prompt + case.shape.rationale, rows=1)
        cuda = torch.cuda.is_available()
        model = outline(config.model, config.engine, None, cuda)
        plan = make_plan(config, model, Workload.of(config, longest), cuda, memory=1 << 40)
    return {"case": case.name, "measured_mib": peak / MIB, "planned_mib": plan.peak / MIB, "ratio": plan.peak / peak}


def _write(job: Job) -> None:
    """In a process of its own: what it frees would be holes in the heap of this one, which no run finds there."""
    other = get_context("spawn").Process(target=job.write)
    other.start()
    other.join()
    assert other.exitcode == 0, "the model was not written"


def _train(job: Job, words: tuple[str, ...]) -> Run:
    if not (job.folder / "model").exists():
        job.write()
    with opened(job, *words) as run:
        for step in range(2):
            group = sample(run, run.rows(step), step)
            gradients(run, group, step)
            run.optimizer.step(step)
            run.teacher.update()
    return run


def _begin() -> int:
    """Bytes held now; what is measured next is their peak from here."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident set begins again
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(name))


def run_case(module: str, number: int) -> Row:
    """A case of a module's CASES in a new process, by its `--case`."""
    command = [sys.executable, "-m", module, "--case", str(number)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
    return json.loads(done.stdout.splitlines()[-1])


def asked(module: str, about: str, cases: Sequence[Case]) -> Path | None:
    """Where the command's rows go, or None; with `--case`, prints that case's row and ends."""
    made = argparse.ArgumentParser(prog=f"python -m {module}", description=about)
    made.add_argument("out", type=Path, nargs="?", metavar="OUT.json", help="write the rows to this file")
    made.add_argument("--case", type=int, choices=range(len(cases)), help="measure one case in this process")
    args = made.parse_args()
    if args.case is not None:
        print(json.dumps(measured(cases[args.case])))
        raise SystemExit(0)
    return args.out


def main() -> None:
    out, found = asked(MODULE, "A plan against what two steps of training take.", CASES), []
    for number in range(len(CASES)):
        found.append(run_case(MODULE, number))
        print(found[-1], flush=True)
    if out is not None:
        out.write_text(json.dumps({**environment(), "rows": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
