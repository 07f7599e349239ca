"""Intervals against their definitions: rows drawn one by one, and counts by hand."""

from __future__ import annotations

import random

import numpy as np
import pytest

from opsd.intervals import macro_f1, paired_difference, wilson


@pytest.mark.parametrize(
    "right, n, low, high", [(50, 100, 0.4038, 0.5962), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0)]
)
def test_wilson_interval(right, n, low, high):
    got = wilson(right, n)
    assert (got.accuracy, got.low, got.high) == pytest.approx((right / n, low, high), abs=1e-4)
    assert got.low <= got.accuracy <= got.high


def percentiles_of_drawn_rows(rows, statistic, replicates=3000):
    draw = random.Random(0)
    values = [statistic([rows[draw.randrange(len(rows))] for _ in rows]) for _ in range(replicates)]
    return np.quantile(values, (0.025, 0.975))


def test_a_paired_difference_is_that_of_rows_drawn_together():
    draw = random.Random(1)
    ours = [draw.random() < 0.8 for _ in range(120)]
    theirs = [right if draw.random() < 0.7 else draw.random() < 0.5 for right in ours]
    got = paired_difference(ours, theirs)
    pairs = list(zip(ours, theirs, strict=True))
    low, high = percentiles_of_drawn_rows(pairs, lambda rows: sum(a - b for a, b in rows) / len(rows))
    assert got.value == pytest.approx((sum(ours) - sum(theirs)) / 120)
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.01)
    unpaired = percentiles_of_drawn_rows(pairs, lambda rows: sum(a for a, _ in rows) / len(rows))
    assert got.high - got.low < 2**0.5 * (unpaired[1] - unpaired[0]), "rows on which both agree narrow it"
    assert paired_difference(theirs, ours).value == -got.value


def test_equal_students_differ_by_nothing_for_certain():
    same = [True, False, True]
    assert tuple(vars(paired_difference(same, same)).values()) == (0, 0, 0)
    with pytest.raises(ValueError, match="shorter"):
        paired_difference(same, [True])


def f1_by_hand(rows, names):
    scores = []
    for name in names:
        hits = sum(truth == said == name for truth, said in rows)
        wrong = sum((truth == name) != (said == name) for truth, said in rows)
        scores.append(2 * hits / (2 * hits + wrong) if hits + wrong else 0.0)
    return sum(scores) / len(scores)


def test_macro_f1():
    draw = random.Random(2)
    labels = [draw.choice("aab") for _ in range(80)] + ["c"] * 5
    answers = [label if draw.random() < 0.6 else draw.choice(["a", "b", "c", "nonsense", None]) for label in labels]
    rows = list(zip(labels, answers, strict=True))
    got = macro_f1(labels, answers)
    assert got.value == pytest.approx(f1_by_hand(rows, "abc"))
    low, high = percentiles_of_drawn_rows(rows, lambda drawn: f1_by_hand(drawn, "abc"))
    assert (got.low, got.high) == pytest.approx((low, high), abs=0.015)
    assert macro_f1(labels, labels).value == 1.0 and macro_f1(labels, [None] * 85).value == 0.0
