"""The scores, as functions of sums over clips, so that a score and its bootstrap replicates are one piece of code.

Letters: n clips, W wheels; G and P are the groups of a clip's truth and prediction under a wheel. A score is
`score(columns.sum(0))`; with whole numbers of draws as weights, `score(weights @ columns)`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from opsd.affect.unibench.wheels import Wheels

Array: TypeAlias = NDArray[np.float64]
KNOWN, HITS, PRECISION, RECALL, MSCORE = range(5)
WHEEL_COLUMNS: Final = 5


def wheel_columns(
    truths: Sequence[list[str]], predictions: Sequence[list[str]], wheels: Wheels, label_space: Sequence[str] = ()
) -> Array:
    """(n, W, 5): per clip and wheel, all 0 where G is empty, otherwise

        1,  |G & P|,  |G & P| / |P|,  |G & P| / |G|,  |G & P| / |P & L|        a fraction without denominator is 0

    with L the groups of `label_space`, the labels that a dataset uses: an answer outside them costs no m-score.
    """
    spaces = wheels.map(label_space)
    columns = np.zeros((len(truths), len(wheels.groups), WHEEL_COLUMNS))
    for i, (truth, prediction) in enumerate(zip(truths, predictions, strict=True)):
        for w, (g, p, space) in enumerate(zip(wheels.map(truth), wheels.map(prediction), spaces, strict=True)):
            if g:
                hits, inside = len(g & p), len(p & space)
                columns[i, w] = (1, hits, hits / max(len(p), 1), hits / len(g), hits / inside if inside else 0)
    return columns


def hit(sums: Array) -> Array:
    """HIT: per wheel the mean of |G & P| over the clips whose G is not empty, then the mean over wheels.

    sums: (..., W, 5). A wheel that knows no truth makes it NaN. Listing every emotion scores 1: see `m_score`.
    """
    return _mean_of(sums, HITS).mean(-1)


def m_score(sums: Array) -> Array:
    """HIT with each clip divided by the number of its answers that fall into the dataset's own label groups."""
    return _mean_of(sums, MSCORE).mean(-1)


def ew_f1(sums: Array) -> Array:
    """EW-F1: per wheel 2 p r / (p + r) from the mean precision p and recall r; 0 at p + r = 0; mean over wheels."""
    p, r = _mean_of(sums, PRECISION), _mean_of(sums, RECALL)
    return _divide(2 * p * r, p + r, otherwise=0.0).mean(-1)


def sample_hit(columns: Array) -> list[float | None]:
    """HIT of each clip: the mean over the wheels that know its truth; None where none does."""
    known = columns[:, :, KNOWN].sum(1)
    values = _divide(columns[:, :, HITS].sum(1), known, otherwise=np.nan)
    return [float(value) if n else None for value, n in zip(values, known, strict=True)]


def sample_ew_f1(columns: Array) -> list[float | None]:
    """2 p r / (p + r) of each clip, averaged over the wheels that know its truth; None where none does.

    The policy for a truth that some wheels do not know (surprise, disgust) is to leave those wheels out.
    """
    p, r = columns[:, :, PRECISION], columns[:, :, RECALL]
    known = columns[:, :, KNOWN]
    values = _divide((_divide(2 * p * r, p + r, otherwise=0.0) * known).sum(1), known.sum(1), otherwise=np.nan)
    return [float(value) if any(row) else None for value, row in zip(values, known, strict=True)]


def sentiment_columns(truths: Sequence[float], predictions: Sequence[int]) -> Array:
    """(n, 4): one 1 per clip, for true positive, false negative, false positive or true negative, where positive is
    truth > 0 and prediction > 0; a clip whose truth is 0 has none."""
    columns = np.zeros((len(truths), 4))
    for i, (truth, prediction) in enumerate(zip(truths, predictions, strict=True)):
        if truth != 0:
            columns[i, 2 * (truth <= 0) + (prediction <= 0)] = 1
    return columns


def waf(sums: Array) -> Array:
    """WAF: F1 of the positive and the negative class, weighted by how often each is true.

    sums: (..., 4).  F+ = 2 tp / (2 tp + fp + fn),  F- = 2 tn / (2 tn + fn + fp)
    """
    tp, fn, fp, tn = (sums[..., k] for k in range(4))
    positive = _divide(2 * tp, 2 * tp + fp + fn, otherwise=0.0)
    negative = _divide(2 * tn, 2 * tn + fp + fn, otherwise=0.0)
    return _divide((tp + fn) * positive + (fp + tn) * negative, sums.sum(-1), otherwise=np.nan)


def replicates(columns: Array, score: Callable[[Array], Array], number: int, seed: int | Sequence[int]) -> Array:
    """(number,) scores of datasets drawn from the clips with replacement, as many as there are (the bootstrap)."""
    n = len(columns)
    draws = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=number).astype(np.float64)
    sums = draws @ columns.reshape(n, -1)
    return score(sums.reshape(number, *columns.shape[1:]))


def interval(values: Array, level: float = 0.95) -> tuple[float, float]:
    """The middle `level` of the replicates. Those without a score (NaN) do not count."""
    low, high = np.nanquantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _mean_of(sums: Array, column: int) -> Array:
    """(..., W): means over the clips a wheel knows."""
    return _divide(sums[..., column], sums[..., KNOWN], otherwise=np.nan)


def _divide(a: Array, b: Array, otherwise: float) -> Array:
    return np.divide(a, b, out=np.full(np.shape(a), otherwise), where=b != 0)
