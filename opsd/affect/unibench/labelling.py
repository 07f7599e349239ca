"""From a checkpoint's files to a dataset's labels: read what is there, extract the rest, keep what was extracted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.extract import Extractor
from opsd.affect.unibench.files import (
    OFFICIAL,
    Predictions,
    digest,
    made_by,
    read_items,
    read_responses,
    usable,
    write_items,
    write_responses,
)
from opsd.affect.unibench.journal import work_through


@dataclass(frozen=True)
class Labelled:
    """What is scored: lists of labels, or sentiments. `source` says who extracted it."""

    items: dict[str, Any]
    source: str


def labels_of(
    dataset: Dataset, found: Predictions, out: Predictions, extractor: Extractor, clips: Mapping[str, Any]
) -> Labelled:
    """The labels of every clip of `clips`, or their sentiments where the dataset is scored by valence.

    found: files that are given. An official file of labels is used as it is, and so is any file of labels without what
    it was made of. out: where new files go, and where those of an earlier, equal run are taken from.
    """
    if dataset.kind != "valence":
        return _openset(found, out, extractor, clips)
    if _given(found.sentiment, found.openset, found.responses):
        return Labelled(read_items(found.sentiment, clips), made_by(found.sentiment))
    openset = _openset(found, out, extractor, clips)
    items = _extracted(out.sentiment, extractor.name, openset.items, extractor.sentiment)
    same = openset.source == extractor.name
    return Labelled(items, extractor.name if same else f"{openset.source}, sentiment by {extractor.name}")


def _openset(found: Predictions, out: Predictions, extractor: Extractor, clips: Mapping[str, Any]) -> Labelled:
    if _given(found.openset, found.responses):
        return Labelled(read_items(found.openset, clips), made_by(found.openset))
    responses = read_responses(found.responses, clips)
    if out.responses != found.responses:
        write_responses(out.responses, responses)  # so that the folder can be scored again by itself
    return Labelled(_extracted(out.openset, extractor.name, responses, extractor.openset), extractor.name)


def _given(labels: Path, *made_of: Path) -> bool:
    return labels.is_file() and (made_by(labels) == OFFICIAL or not any(path.is_file() for path in made_of))


def _extracted(
    path: Path, extractor: str, texts: Mapping[str, Any], extract: Callable[[dict[str, Any]], dict[str, str]]
) -> dict[str, Any]:
    source = digest(texts)
    if usable(path, extractor, source):
        return read_items(path, texts)
    items = work_through(path, f"{extractor} {source}", texts, extract)
    write_items(path, items, extractor, source)
    return dict(items)
