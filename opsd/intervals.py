"""95 % intervals: of a share, of a macro-F1, and of the difference of two students on the same rows.

The bootstrap draws as many rows as there are, with replacement. A statistic that is a function of how many rows show
what needs no rows: the counts themselves are drawn, from a multinomial distribution, which is the same thing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

_REPLICATES = 10_000


@dataclass(frozen=True)
class Accuracy:
    """Share of right answers with its 95 % Wilson score interval."""

    accuracy: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % percentile bootstrap interval."""

    value: float
    low: float
    high: float


def wilson(right: int, n: int, z: float = 1.959964) -> Accuracy:
    """p = right / n; (p + z^2/2n +- z sqrt(p(1-p)/n + z^2/4n^2)) / (1 + z^2/n)   (Wilson, 1927)."""
    p, shrink = right / n, 1 + z * z / n
    centre = (p + z * z / (2 * n)) / shrink
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / shrink
    # at p = 0 and p = 1 a bound equals p, but for rounding
    return Accuracy(p, min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half)), n)


def paired_difference(ours: Sequence[bool], theirs: Sequence[bool], seed: int = 0) -> Interval:
    """Accuracy of ours minus that of theirs on the same rows; rows on which both agree narrow the interval."""
    rows = [int(a) - int(b) for a, b in zip(ours, theirs, strict=True)]
    return _bootstrap(rows, lambda kinds, counts: counts @ np.array(kinds) / len(rows), seed)


def macro_f1(labels: Sequence[str], answers: Sequence[str | None], seed: int = 0) -> Interval:
    """Mean over the labels of F1 = 2 TP / (2 TP + FP + FN). An answer that is no label is missing, of no class.

    A label of which a replicate has neither row nor answer counts as 0 there, as scikit-learn has it.
    """
    names = sorted(set(labels))

    def statistic(kinds: list[Any], counts: Any) -> Any:
        truth, said = ([kind[side] for kind in kinds] for side in (0, 1))
        scores = []
        for name in names:
            is_true, is_said = (np.array([one == name for one in side], dtype=float) for side in (truth, said))
            hits, both = counts @ (is_true * is_said), counts @ (is_true + is_said)  # TP, 2 TP + FP + FN
            scores.append(2 * hits / np.maximum(both, 1))
        return np.mean(scores, axis=0)

    return _bootstrap(list(zip(labels, answers, strict=True)), statistic, seed)


def _bootstrap(rows: Sequence[Hashable], statistic: Callable[[list[Any], Any], Any], seed: int) -> Interval:
    """statistic: (kinds of rows, their counts (replicates, kinds)) -> (replicates,)."""
    tally = Counter(rows)
    kinds, counts = list(tally), np.array(list(tally.values()))
    drawn = np.random.default_rng(seed).multinomial(len(rows), counts / len(rows), size=_REPLICATES)
    low, high = np.quantile(statistic(kinds, drawn), (0.025, 0.975))
    return Interval(float(statistic(kinds, counts[None])[0]), float(low), float(high))
