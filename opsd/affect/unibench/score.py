"""One dataset scored: the number, its interval, and what every clip contributes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from opsd.affect.unibench import metrics
from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.labels import parse_labels, parse_sentiment
from opsd.affect.unibench.metrics import Array
from opsd.affect.unibench.wheels import Wheels
from opsd.errors import InputError


@dataclass(frozen=True)
class Bootstrap:
    replicates: int = 1000
    seed: int = 0


@dataclass(frozen=True)
class Score:
    """`value` in [0, 1]; `more` has the scores that stand beside it; `replicates` those of resampled datasets."""

    dataset: Dataset
    value: float
    more: dict[str, float]
    clips: int
    replicates: Array
    samples: list[dict[str, Any]]

    @property
    def interval(self) -> tuple[float, float]:
        return metrics.interval(self.replicates)


def score(
    dataset: Dataset, truth: Mapping[str, Any], labels: Mapping[str, Any], wheels: Wheels, bootstrap: Bootstrap
) -> Score:
    """truth: clip -> label, valence or labels; labels: clip -> list of labels, or sentiment (for valence)."""
    if dataset.kind == "valence":
        columns, samples = _by_sentiment(truth, labels)
        formula, more = metrics.waf, {}
    else:
        columns, samples = _by_wheels(dataset, truth, labels, wheels)
        formula = metrics.hit if dataset.kind == "discrete" else metrics.ew_f1
        more = {"m-score": float(metrics.m_score(columns.sum(0)))} if dataset.kind == "discrete" else {}
    _check(dataset, columns)
    return Score(
        dataset,
        float(formula(columns.sum(0))),
        more,
        len(truth),
        metrics.replicates(columns, formula, bootstrap.replicates, bootstrap.seed),
        samples,
    )


def _by_wheels(
    dataset: Dataset, truth: Mapping[str, Any], labels: Mapping[str, Any], wheels: Wheels
) -> tuple[Array, list[dict[str, Any]]]:
    predictions = {name: parse_labels(labels[name]) for name in truth}
    columns = metrics.wheel_columns(
        [parse_labels(value) for value in truth.values()],
        list(predictions.values()),
        wheels,
        label_space=sorted(set(truth.values())),
    )
    of_clip: Callable[[Array], list[float | None]] = metrics.sample_ew_f1
    if dataset.kind == "discrete":
        of_clip = lambda columns: metrics.sample_scores(columns, metrics.HITS)  # noqa: E731
    samples = [
        {"dataset": dataset.name, "clip": name, "truth": truth[name], "labels": predictions[name], "score": value}
        for name, value in zip(truth, of_clip(columns), strict=True)
    ]
    return columns, samples


def _by_sentiment(truth: Mapping[str, Any], labels: Mapping[str, Any]) -> tuple[Array, list[dict[str, Any]]]:
    signs = {name: parse_sentiment(labels[name]) for name in truth}
    samples = [
        {
            "clip": name,
            "truth": value,
            "sentiment": signs[name],
            "score": None if value == 0 else float((value > 0) == (signs[name] > 0)),
        }
        for name, value in truth.items()
    ]
    return metrics.sentiment_columns(list(truth.values()), list(signs.values())), samples


def _check(dataset: Dataset, columns: Array) -> None:
    """A mean over no clips is no score; the official script prints NaN."""
    if dataset.kind == "valence":
        if not columns.any():
            raise InputError("a clip whose valence is not 0", "none", file=dataset.folder, field=dataset.name)
        return
    known = columns[:, :, metrics.KNOWN].sum(0)
    if not known.all():
        wheel = f"wheel{int(np.argmin(known)) + 1}"
        raise InputError(f"a label that {wheel} knows", "none", file=dataset.folder, field=dataset.name)
