"""What a run achieved: a table in the terminal, a plot in the run directory, and a page for people.

`python -m opsd.report RUN_DIR` writes the page: curves, the table, and sampled clips with both answers token by token.
"""

from __future__ import annotations

import argparse
import random
import shlex
import sys
from pathlib import Path
from typing import Any

from opsd.cli import guard
from opsd.config import Config, load_config
from opsd.data import Example, read_examples
from opsd.errors import InputError, writing
from opsd.log import RunDir
from opsd.page.charts import smooth
from opsd.shelf import Shelf

SPLITS = ("test", "validation", "train")


def write_report(directory: RunDir) -> None:
    """Print accuracy before and after, and write RUN/report.png from the run's own JSONL files."""
    evaluations, metrics = directory.read("evaluations"), directory.read("metrics")
    if evaluations:
        _print_table(evaluations)
    if metrics:
        path = directory.path / "report.png"
        with writing(path):
            _plot(evaluations, metrics, path)
        print(f"plot: {path}")
    print(f"run: {directory.path}")
    print(f"page of curves and clips: python -m opsd.report {shlex.quote(str(directory.path))}")


def rows_of_table(evaluations: list[dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Student before, teacher before, student after, teacher after - on the test split, as far as measured."""
    split = "test" if any(r["split"] == "test" for r in evaluations) else "validation"
    records = [r for r in evaluations if r["split"] == split]
    first, last = min(r["step"] for r in records), max(r["step"] for r in records)
    rows = []
    for when, step in (("before", first), ("after", last)):
        for view in ("student", "teacher"):
            found = [r for r in records if r["step"] == step and r["view"] == view]
            rows += [(f"{_name(found[-1])}, {when}", found[-1])] if found else []
    return rows


def _name(record: dict[str, Any]) -> str:
    if record["view"] == "student":
        return "student"
    return "teacher without privilege" if record["privilege"] == "none" else f"teacher with {record['privilege']}"


def _print_table(evaluations: list[dict[str, Any]]) -> None:
    from rich.console import Console
    from rich.table import Table

    rows = rows_of_table(evaluations)
    table = Table("", "accuracy", "95 % interval", "clips", title="held-out rows, greedy answers")
    for name, r in rows:
        table.add_row(name, f"{r['accuracy']:.1%}", f"{r['low']:.1%} - {r['high']:.1%}", str(r["n"]))
    students = [r["accuracy"] for name, r in rows if name.startswith("student")]
    if len(students) == 2:
        table.caption = f"student: {100 * (students[1] - students[0]):+.1f} points"
    Console().print(table)


def _plot(evaluations: list[dict[str, Any]], metrics: list[dict[str, Any]], path: Any) -> None:
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(10, 3.6), layout="constrained")
    bars, curves = figure.subplots(1, 2, width_ratios=(1, 1.4))
    rows = rows_of_table(evaluations) if evaluations else []
    values = [r["accuracy"] for _, r in rows]
    errors = [[r["accuracy"] - r["low"] for _, r in rows], [r["high"] - r["accuracy"] for _, r in rows]]
    colours = ["tab:blue" if name.startswith("student") else "tab:orange" for name, _ in rows]
    labels = [name.replace(" with", "\nwith").replace(", ", "\n") for name, _ in rows]
    bars.bar(labels, values, yerr=errors, color=colours, capsize=3)
    bars.set(ylim=(0, 1), ylabel="accuracy on held-out rows")
    bars.tick_params(axis="x", labelsize=7)
    for place, value in enumerate(values):
        bars.annotate(f"{value:.0%}", (place, 0.02), ha="center", color="white", fontweight="bold")

    steps = [m["step"] for m in metrics]
    curves.set(xlabel="step", ylim=(0, 1))
    if "accuracy" in metrics[0]:
        curves.plot(steps, smooth([m["accuracy"] for m in metrics]), label="accuracy of rollouts", color="tab:blue")
    name = "divergence" if "divergence" in metrics[0] else "loss"
    other = curves.twinx()
    other.plot(steps, smooth([m[name] for m in metrics]), color="tab:red", label=f"{name} per token")
    other.set_ylim(bottom=0)
    lines = [*curves.get_lines(), *other.get_lines()]
    curves.legend(lines, [str(line.get_label()) for line in lines], loc="center right", fontsize=8)
    figure.savefig(path, dpi=130)


def run(args: argparse.Namespace) -> None:
    """Write the page. Without clips no model is loaded, and a run that was stopped early has a page too."""
    directory = RunDir(args.run_dir)
    config = load_config(directory.path / "config.yaml")
    out = args.out or directory.path / "report.html"
    if not out.parent.is_dir() or out.is_dir():
        raise InputError("a file in an existing folder", str(out), field="--out")
    evaluations = directory.read("evaluations")
    replayed, about = [], ""
    if args.clips:
        from opsd.page.replay import decodes, replay

        last = Shelf(directory.checkpoints).newest()
        if last is None:
            raise InputError(
                "a checkpoint to answer with", "none", file=directory.checkpoints, hint="--clips 0 shows the curves"
            )
        split, drawn = _rows(config, args.split, args.clips, args.seed)
        rows = [row for row in drawn if decodes(row, config)]
        replayed = replay(config, last, rows)
        about = f"{len(rows)} clips drawn from the {split} split, answered greedily after {last.step} steps and before."
        about += f" {left} more do not decode." if (left := len(drawn) - len(rows)) else ""
    from opsd.page.render import render

    page = render(directory, config, rows_of_table(evaluations) if evaluations else [], replayed, about)
    with writing(out):
        out.write_bytes(page.encode("utf-8", "replace"))  # a file name may hold bytes that are no text
    print(f"page: {out} ({out.stat().st_size / 1e6:.1f} MB)")


def _rows(config: Config, split: str | None, count: int, seed: int) -> tuple[str, list[Example]]:
    """Rows drawn from a split, in the order of their file: the same for the same seed."""
    known = [name for name in SPLITS if getattr(config.data, name) is not None]
    if split is not None and split not in known:
        raise InputError(f"a split of the run: {', '.join(known)}", repr(split), field="--split")
    split = split or known[0]
    rows = read_examples(getattr(config.data, split), config.data, held_out=split != "train")
    drawn = random.Random(f"opsd report {seed}").sample(range(len(rows)), min(count, len(rows)))
    return split, [rows[place] for place in sorted(drawn)]


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise ValueError(text)
    return number


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m opsd.report",
        description="One HTML page of a run, self-contained: curves, accuracy, and sampled clips before and after.",
        allow_abbrev=False,
    )
    made.add_argument("run_dir", type=Path, help="a run of opsd.train")
    made.add_argument("--clips", type=_count, default=8, metavar="N", help="rows to show (8); 0 loads no model")
    made.add_argument("--split", choices=SPLITS, help="where they come from; the default is the first the run has")
    made.add_argument("--seed", type=int, default=0, help="which rows are drawn (0)")
    made.add_argument("--out", type=Path, metavar="FILE", help="default RUN_DIR/report.html")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return guard(run, made, argv)


if __name__ == "__main__":
    sys.exit(main())
