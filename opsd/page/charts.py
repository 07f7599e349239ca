"""From the lines of metrics.jsonl and evaluations.jsonl to curves: which there are, their points, their axes.

A curve that a run did not measure is not there; a value that is not finite is left out, and counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from opsd.config import RewardsConfig
from opsd.log import PHASES

Record = dict[str, Any]

MOST_POINTS = 240  # a longer curve is shown as means of consecutive lines
WIDTH, HEIGHT = 360, 190
LEFT, RIGHT, TOP, BOTTOM = 46, 10, 8, 24


@dataclass(frozen=True)
class Series:
    name: str
    colour: str  # a class of page.css
    x: list[float]  # steps
    y: list[float]
    intervals: list[tuple[float, float]] = field(default_factory=list)  # (low, high) of every point, or none


@dataclass(frozen=True)
class Chart:
    title: str
    unit: str
    series: list[Series]
    note: str  # what was done to the numbers, empty where nothing was
    top: float  # of the y axis
    bottom: float
    last_step: float

    def across(self, step: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * step / max(self.last_step, 1)

    def down(self, value: float) -> float:
        share = (value - self.bottom) / (self.top - self.bottom)
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - min(max(share, 0.0), 1.0))

    def path(self, series: Series, smoothed: bool) -> str:
        values = smooth(series.y) if smoothed else series.y
        points = zip(map(self.across, series.x), map(self.down, values), strict=True)
        return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)

    @property
    def x_ticks(self) -> list[float]:
        return ticks(0, max(self.last_step, 1))

    @property
    def y_ticks(self) -> list[float]:
        return ticks(self.bottom, self.top)


@dataclass(frozen=True)
class Wanted:
    """A chart that may be: its title, unit, top (None: where its values end), and its curves by name and colour."""

    title: str
    unit: str
    top: float | None
    curves: dict[str, tuple[str, str | Callable[[Record], float]]]  # name -> colour, key of the record or function


def charts(metrics: list[Record], evaluations: list[Record], rewards: RewardsConfig) -> list[Chart]:
    """Every chart that the run has numbers for."""
    found = [_curves(wanted, metrics) for wanted in _wanted(rewards)]
    return [chart for chart in [_held_out(evaluations), *found] if chart is not None]


def _wanted(rewards: RewardsConfig) -> list[Wanted]:
    def reward(record: Record) -> float:  # linear, so the mean reward is that of the means
        return rewards.accuracy * record["accuracy"] + rewards.format * record["format"]

    speeds: dict[str, tuple[str, str | Callable[[Record], float]]] = {
        phase: (colour, f"{phase}_tokens_per_second")
        for phase, colour in zip(PHASES, ("other", "teacher", "student"), strict=True)
    }
    return [
        Wanted(
            "Loss and divergence",
            "nats",
            None,
            {"loss": ("other", "loss"), "divergence": ("student", "divergence")},
        ),
        Wanted("Accuracy of rollouts", "", 1.0, {"accuracy": ("student", "accuracy")}),
        Wanted("Reward of rollouts", "", None, {"reward": ("student", reward)}),
        Wanted(
            "Format of rollouts", "", 1.0, {"well formed": ("student", "format"), "truncated": ("other", "truncated")}
        ),
        Wanted("Length of responses", "tokens", None, {"length": ("student", "response_length")}),
        Wanted(
            "Entropy",
            "nats per token",
            None,
            {"student": ("student", "student_entropy"), "teacher": ("teacher", "teacher_entropy")},
        ),
        Wanted("Speed", "response tokens per second of a phase", None, speeds),
        Wanted("Saved by sharing", "share of a padded loop's tokens", 1.0, {"saved": ("student", "saved_tokens")}),
    ]


def _curves(wanted: Wanted, records: list[Record]) -> Chart | None:
    series, lost = [], 0
    for name, (colour, read) in wanted.curves.items():
        points = [(r["step"], value) for r in records if (value := _read(r, read)) is not None]
        finite = [(step, value) for step, value in points if math.isfinite(value)]
        lost += len(points) - len(finite)
        if finite:
            series.append(Series(name, colour, *map(list, zip(*_thinned(finite), strict=True))))
    per_point = -(-len(records) // MOST_POINTS)
    notes = [f"points are means of {per_point} lines"] * (per_point > 1)
    notes += [f"{lost} values were not finite"] * (lost > 0)
    return _chart(wanted.title, wanted.unit, series, wanted.top, "; ".join(notes)) if series else None


def _read(record: Record, read: str | Callable[[Record], float]) -> float | None:
    if isinstance(read, str):
        return record.get(read)
    try:
        return read(record)
    except KeyError:
        return None


def _held_out(evaluations: list[Record]) -> Chart | None:
    """Accuracy of both views over the steps, with intervals, on the split that was measured most often."""
    splits = {record["split"] for record in evaluations}
    if not splits:
        return None
    split = max(sorted(splits), key=lambda name: len({r["step"] for r in evaluations if r["split"] == name}))
    series = []
    for view in ("student", "teacher"):
        found = [r for r in evaluations if r["split"] == split and r["view"] == view]
        if found:
            steps, values = [r["step"] for r in found], [r["accuracy"] for r in found]
            series.append(Series(view, view, steps, values, [(r["low"], r["high"]) for r in found]))
    return _chart(f"Held-out accuracy ({split})", "", series, 1.0, "bars are 95 % intervals") if series else None


def _chart(title: str, unit: str, series: list[Series], top: float | None, note: str) -> Chart:
    values = [value for one in series for value in one.y]
    low, high = min(0.0, *values), max(top or 0.0, *values)
    span = ticks(low, high if high > low else low + 1.0)
    step = span[1] - span[0]
    bottom = span[0] if span[0] <= low else span[0] - step
    above = span[-1] if span[-1] >= high or top is not None else span[-1] + step
    return Chart(title, unit, series, note, above, bottom, max(max(one.x) for one in series))


def ticks(low: float, high: float, most: int = 5) -> list[float]:
    """Round numbers in [low, high], at most `most` + 1 of them: steps of 1, 2 or 5 times a power of ten."""
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def smooth(values: Sequence[float], share: float = 0.05) -> list[float]:
    """Trailing mean over the last 5 % of the steps so far seen: rollout accuracy is noisy step by step."""
    width = max(1, round(share * len(values)))
    return [sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))]


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most MOST_POINTS points: means of as many consecutive ones each, at the last of their steps."""
    size = -(-len(points) // MOST_POINTS)
    groups = [points[first : first + size] for first in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]
