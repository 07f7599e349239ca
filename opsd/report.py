"""What a run achieved: a table in the terminal, a plot in the run directory."""

from __future__ import annotations

from typing import Any

from opsd.errors import writing
from opsd.log import RunDir


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
        curves.plot(steps, _smooth([m["accuracy"] for m in metrics]), label="accuracy of rollouts", color="tab:blue")
    name = "divergence" if "divergence" in metrics[0] else "loss"
    other = curves.twinx()
    other.plot(steps, _smooth([m[name] for m in metrics]), color="tab:red", label=f"{name} per token")
    other.set_ylim(bottom=0)
    lines = [*curves.get_lines(), *other.get_lines()]
    curves.legend(lines, [str(line.get_label()) for line in lines], loc="center right", fontsize=8)
    figure.savefig(path, dpi=130)


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    """Trailing mean over the last 5 % of the steps so far seen: rollout accuracy is noisy step by step."""
    width = max(1, round(share * len(values)))
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]
