"""Curves of the page: which there are, and where their points lie."""

from __future__ import annotations

import math

import pytest

from opsd.page.charts import BOTTOM, HEIGHT, LEFT, MOST_POINTS, RIGHT, TOP, WIDTH, charts, ticks
from opsd.sections import RewardsConfig


def line(step, **values):
    return {"step": step, "loss": 2.0, **values}


def of(metrics, title, rewards=RewardsConfig(), evaluations=()):  # noqa: B008 - it is frozen
    return next((c for c in charts(metrics, list(evaluations), rewards) if c.title.startswith(title)), None)


def test_only_what_was_measured_is_drawn():
    assert [c.title for c in charts([line(1), line(2)], [], RewardsConfig())] == ["Loss and divergence"]
    assert charts([], [], RewardsConfig()) == []


def test_the_reward_is_the_weighted_sum_of_its_parts():
    chart = of([line(1, accuracy=0.5, format=1.0)], "Reward", RewardsConfig(accuracy=2.0, format=-3.0))
    assert chart.series[0].y == [-2.0] and chart.bottom <= -2.0 and chart.top >= 0.0


def test_a_point_lies_where_its_step_and_value_say():
    chart = of([line(5, accuracy=0.25), line(10, accuracy=1.0)], "Accuracy")
    assert chart.path(chart.series[0], smoothed=False) == (
        f"M{LEFT + (WIDTH - LEFT - RIGHT) / 2:.1f},{TOP + (HEIGHT - TOP - BOTTOM) * 0.75:.1f}"
        f"L{WIDTH - RIGHT:.1f},{TOP:.1f}"
    )


def test_values_that_are_not_finite_are_left_out_and_counted():
    chart = of([line(1, divergence=math.nan), line(2, divergence=math.inf), line(3, divergence=1.0)], "Loss")
    assert chart.series[1].x == [3] and chart.note == "2 values were not finite"
    assert of([{"step": 1, "loss": math.nan}], "Loss") is None


def test_long_runs_are_means_and_say_so():
    chart = of([line(step, accuracy=step % 2) for step in range(1, 5 * MOST_POINTS)], "Accuracy")
    assert len(chart.series[0].x) <= MOST_POINTS and chart.series[0].x[-1] == 5 * MOST_POINTS - 1
    assert set(chart.series[0].y) <= {0.4, 0.6, 0.5} and "means of 5 lines" in chart.note


def test_held_out_accuracy_is_of_the_split_measured_most_often():
    def measured(step, split, view="student"):
        return {"step": step, "split": split, "view": view, "accuracy": 0.5, "low": 0.4, "high": 0.6}

    records = [measured(0, "test"), measured(0, "validation"), measured(5, "validation")]
    chart = of([], "Held-out", evaluations=records)
    assert chart.title == "Held-out accuracy (validation)"
    assert chart.series[0].x == [0, 5] and chart.series[0].intervals == [(0.4, 0.6)] * 2
    both = [measured(0, "test"), measured(5, "test", "teacher")]
    assert [s.name for s in of([], "Held-out", evaluations=both).series] == ["student", "teacher"]


@pytest.mark.parametrize(
    "low, high, want",
    [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]), (0, 180, [0, 50, 100, 150]), (-2, 3, [-2, -1, 0, 1, 2, 3]), (0, 3e-5, None)],
)
def test_ticks_are_round_and_few(low, high, want):
    got = ticks(low, high)
    assert 3 <= len(got) <= 6 and got[0] >= low and got[-1] <= high * (1 + 1e-9)
    assert want is None or got == pytest.approx(want)


@pytest.mark.parametrize("values", [[0.0, 0.0], [1e-12], [-5.0, -5.0], [3e7, 1e9]])
def test_every_value_lies_inside_its_axis(values):
    chart = of([line(i, response_length=v) for i, v in enumerate(values)], "Length")
    assert chart.bottom <= min(values) and chart.top >= max(values)
