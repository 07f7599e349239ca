"""One dataset scored: the number, its interval, and what every clip contributes."""

from __future__ import annotations

from collections.abc import Mapping
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
    """`value` in [0, 1]; `more` has the scores that stand beside it; `replicates` those of resampled datasets;
    `samples` one record per clip."""

    dataset: Dataset
    value: float
    more: dict[str, float]
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
        answers: dict[str, Any] = {name: parse_sentiment(labels[name]) for name in truth}
        columns = metrics.sentiment_columns(list(truth.values()), list(answers.values()))
        formula, more = metrics.waf, {}
        of_clip = [_agree(truth[name], answers[name]) for name in truth]
    else:
        answers = {name: parse_labels(labels[name]) for name in truth}
        columns = metrics.wheel_columns(
            [parse_labels(value) for value in truth.values()],
            list(answers.values()),
            wheels,
            label_space=sorted(set(truth.values())),
        )
        if dataset.kind == "discrete":
            formula, of_clip = metrics.hit, metrics.sample_hit(columns)
            more = {"m-score": float(metrics.m_score(columns.sum(0)))}
        else:
            formula, of_clip, more = metrics.ew_f1, metrics.sample_ew_f1(columns), {}
    _check(dataset, columns)
    return Score(
        dataset,
        float(formula(columns.sum(0))),
        more,
        # a stream of its own per dataset: the interval of the mean takes datasets to be independent
        metrics.replicates(columns, formula, bootstrap.replicates, [bootstrap.seed, *dataset.name.encode()]),
        [
            {"dataset": dataset.name, "clip": name, "truth": truth[name], "answer": answers[name], "score": value}
            for name, value in zip(truth, of_clip, strict=True)
        ],
    )


def _agree(valence: float, sentiment: int) -> float | None:
    """Whether both are positive or neither is; None for a valence of 0, which WAF leaves out."""
    return None if valence == 0 else float((valence > 0) == (sentiment > 0))


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
