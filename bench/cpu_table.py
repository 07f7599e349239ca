"""`python -m bench.cpu_table [bench/results/op-cpu.json]`: what bench.cpu_report found, as the table of the README, and
as a picture beside the file.

Times by that of the head GEMMs of the same round (the floor), medians over rounds; MiB beside inputs and results, fp32.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from bench.cases import SHAPES, case

RESULTS = Path(__file__).parent / "results" / "op-cpu.json"
COLUMNS = {"native": "opsd", "torch.compile": "torch.compile", "Liger chunked": "Liger"}
DTYPES = {torch.float32: "fp32", torch.bfloat16: "bf16"}
LINES = [(shape, kind, trainable) for shape in SHAPES for kind in ("jsd", "reverse_kl") for trainable in (False, True)]
Row = dict[str, Any]


def table(rows: list[Row]) -> str:
    """Markdown. A provider has a column for each dtype it was timed in, and a dash where it was not."""
    found, shown = _timed(rows)
    heads = [f"{COLUMNS[name]}, {DTYPES[dtype]}" for dtype, name in shown]
    lines = [f"| N, V, D | divergence | head | {' | '.join(heads)} | MiB: {', '.join(COLUMNS.values())} |"]
    lines.append("|---" * (len(heads) + 4) + "|")
    for shape, kind, trainable in LINES:
        of = {
            (d, name): found.get((str(case(shape, kind, d, trainable)), name), {}) for d in DTYPES for name in COLUMNS
        }
        ratios = " | ".join(_cell(of[one], "of_floor", ".2f") for one in shown)
        mib = ", ".join(_cell(of[torch.float32, name], "extra_mib", ".0f") for name in COLUMNS)
        lines.append(f"| {', '.join(map(str, SHAPES[shape]))} | {kind} | {_head(trainable)} | {ratios} | {mib} |")
    return "\n".join(lines)


def draw(path: Path, rows: list[Row]) -> None:
    """A bar for every ratio of the table, a panel for each dtype."""
    from matplotlib.figure import Figure

    found, shown = _timed(rows)
    figure = Figure(figsize=(11, 6), layout="constrained")
    for axis, dtype in zip(figure.subplots(1, len(DTYPES), sharey=True), DTYPES, strict=True):
        names = [name for of, name in shown if of == dtype]
        for i, name in enumerate(names):
            of_floor = [found.get((str(case(*one[:2], dtype, one[2])), name), {}).get("of_floor", 0.0) for one in LINES]
            places = [place + (i + 0.5) * 0.8 / len(names) for place in range(len(LINES))]
            bars = axis.barh(places, of_floor, 0.8 / len(names), label=COLUMNS[name])
            axis.bar_label(bars, [f"{x:.2f}" if x else "" for x in of_floor], padding=2, fontsize=6)
        axis.set_yticks([i + 0.4 for i in range(len(LINES))], [f"{s} {k} {_head(t)}" for s, k, t in LINES], fontsize=8)
        axis.axvline(1, color="0.6", linewidth=0.8)
        axis.set_xlabel(f"{DTYPES[dtype]}: time by that of the head GEMMs")
        axis.legend(loc="lower right")
    figure.axes[0].invert_yaxis()
    figure.savefig(path, dpi=120)


def _timed(rows: list[Row]) -> tuple[dict[tuple[str, str], Row], list[tuple[torch.dtype, str]]]:
    """Rows with a time by case and provider, and the columns that they make."""
    found = {(row["case"], row["provider"]): row for row in rows if "ms" in row}
    every = [(dtype, name) for dtype in DTYPES for name in COLUMNS]
    return found, [(d, name) for d, name in every if any(name == of and f" {_of(d)} " in which for which, of in found)]


def _head(trainable: bool) -> str:
    return "trained" if trainable else "frozen"


def _of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cell(row: Row, name: str, form: str) -> str:
    return format(row[name], form) if name in row else "-"


if __name__ == "__main__":
    source = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    measured = json.loads(source.read_text(encoding="utf-8"))["rows"]
    print(table(measured))
    draw(source.with_suffix(".png"), measured)
