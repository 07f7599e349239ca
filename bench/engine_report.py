"""The targets of the packed engine, measured: ratios of interleaved steps of one process, values compared first.

    PYTHONPATH=.:kernels python -m bench.engine_report speed [options]    # one row per task
    PYTHONPATH=.:kernels python -m bench.engine_report step [options]     # a whole step against TRL's SDFTTrainer
    PYTHONPATH=.:kernels python -m bench.engine_report memory [options]   # peaks over token budget and group size

Rows are added to bench/results/engine-cpu.json (--out), one for each task and depth, and engine-cpu.png is drawn again.
Every layer costs the same, so ratios barely depend on --layers; the head costs what it costs at any depth.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from bench import engine_memory, engine_step
from bench.engine_cases import SMOLLM2, Shape, Size, language_model
from bench.engine_tasks import OURS, TASKS, Steps, Task
from bench.measure import interleaved, peak_extra_bytes, summary
from bench.results import Row
from bench.sections import Budget
from opsd.environment import environment
from opsd.model import LanguageModel

STEP, STEP_TARGET, STEP_MEMORY = Shape(300, 200, 48, 8), 2.5, 0.5


def ratios(steps: dict[str, Callable[[], Any]], rounds: int, seconds: float = float("inf")) -> Row:
    """Timings by name, and how many times as long the second takes: by medians, by the best, by round."""
    times = interleaved(steps, rounds, seconds)
    ours, peer = times.values()
    each = sorted(b / a for a, b in zip(ours, peer, strict=True))
    return {
        "timings": {name: summary(found) for name, found in times.items()},
        "ratio": statistics.median(peer) / statistics.median(ours),
        "best_ratio": min(peer) / min(ours),
        "rounds": [round(one, 2) for one in each],
    }


def measure(task: Task, model: LanguageModel, rounds: int, seconds: float = float("inf")) -> Row:
    """The gate, which also warms up, then the timings. A wrong result raises AssertionError."""
    steps: Steps = task.build(model, task.shape)
    steps.gate()
    found = ratios({OURS: steps.ours, task.peer: steps.peer}, rounds, seconds)
    return {"task": str(task), "target": task.target, "tokens": task.shape.tokens, **found}


def whole_step(size: Size, layers: int, shape: Shape, rounds: int, seconds: float = float("inf")) -> Row:
    """Time of a step, and its peak of memory above weights, teacher and optimizer, against TRL's."""
    with engine_step.against_sdft(size, layers, shape) as (name, steps):
        steps.gate()
        both = {OURS: steps.ours, name: steps.peer}
        memory = peaks(both)
        found = ratios(both, rounds, seconds)
    return {"task": f"whole step {shape}", "target": STEP_TARGET, "tokens": shape.tokens, **found, **memory}


def peaks(steps: dict[str, Callable[[], Any]]) -> Row:
    """Peaks in MiB by name, and the share that the first is of the second."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    ours, peer = found = [peak_extra_bytes(step, device) / 2**20 for step in steps.values()]
    return {
        "extra_mib": dict(zip(steps, found, strict=True)),
        "memory_share": ours / peer,
        "memory_target": STEP_MEMORY,
    }


def section(budget: Budget) -> Iterator[Row]:
    """For bench.gpu_report: every task at full depth on the device; a wrong one fails the report."""
    model = language_model(SMOLLM2, device="cuda")
    for i, task in enumerate(TASKS):
        if budget.left < 3:
            yield {"task": str(task), "absent": "no time left"}
            continue
        try:
            row = measure(task, model, rounds=20, seconds=budget.left / (len(TASKS) - i))
        except AssertionError as error:
            row = {"task": str(task), "ok": False, "error": str(error)}
        yield row


def line(row: Row) -> str:
    """A row for the terminal."""
    if "ratio" not in row:
        return f"{row['task']}: {row['extra_mib']:.0f} MiB"
    times = ", ".join(f"{name} {found['ms']:.0f} ms" for name, found in row["timings"].items())
    verdict = "met" if row["ratio"] >= row["target"] else "MISSED"
    times += f"; rounds {row['rounds'][0]}-{row['rounds'][-1]}"
    memory = f"; memory {row['memory_share']:.2f} of the peer's" if "memory_share" in row else ""
    return f"{row['task']}: {row['ratio']:.2f}x, at least {row['target']}: {verdict} ({times}{memory})"


def keep(path: Path, rows: list[Row]) -> None:
    """Add rows to the file, in the place of older ones of the same task and depth, and draw it."""
    known: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    key = lambda row: (row["task"], row.get("layers"))  # noqa: E731
    fresh = {key(row) for row in rows}
    rows = [row for row in known if key(row) not in fresh] + rows
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    draw(path.with_suffix(".png"), [row for row in rows if "ratio" in row])


def draw(path: Path, rows: list[Row]) -> None:
    """Ratios as bars, targets as marks."""
    from matplotlib.figure import Figure

    if not rows:
        return
    figure = Figure(figsize=(8, 1 + 0.4 * len(rows)), layout="constrained")
    axis = figure.subplots()
    names = [f"{row['task']}\nagainst {list(row['timings'])[1]}" for row in rows]
    bars = axis.barh(names, [row["ratio"] for row in rows], color="tab:red")
    axis.bar_label(bars, [f"{row['ratio']:.2f}x" for row in rows], padding=3, fontsize=8)
    axis.plot([row["target"] for row in rows], names, "k|", markersize=14, label="target")
    axis.tick_params(axis="y", labelsize=7)
    axis.set_xlabel("times as fast")
    axis.margins(x=0.1)
    axis.legend(loc="lower right", fontsize=8)
    figure.savefig(path, dpi=120)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.engine_report")
    parser.add_argument("what", choices=("speed", "step", "memory"))
    parser.add_argument("--layers", type=int, default=SMOLLM2.layers, help="depth, at the widths of SmolLM2-135M")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=60.0, help="no further round of a task after so long")
    parser.add_argument("--only", default="", help="tasks whose name contains this")
    parser.add_argument("--out", type=Path, default=Path("bench/results/engine-cpu.json"))
    args = parser.parse_args()
    about = environment()  # of every row: peers may live in another environment
    facts = {
        "layers": args.layers,
        "device": "cuda" if torch.cuda.is_available() else "cpu",
        "commit": about["commit"],
        "versions": about["versions"],
    }
    rows = []
    for row in _rows(args):
        rows.append({**row, **facts, "measured": time.strftime("%Y-%m-%d")})
        print(line(row), flush=True)
        keep(args.out, rows)
    return 0


def _rows(args: argparse.Namespace) -> Iterator[Row]:
    if args.what == "step":
        yield whole_step(SMOLLM2, args.layers, STEP, args.rounds, args.seconds)
    elif args.what == "memory":
        yield from engine_memory.rows(SMOLLM2, args.layers)
    else:
        model = language_model(SMOLLM2, args.layers, "cuda" if torch.cuda.is_available() else "cpu")
        for task in TASKS:
            if args.only in str(task):
                yield measure(task, model, args.rounds, args.seconds)


if __name__ == "__main__":
    raise SystemExit(main())
