"""From a checkpoint's files to a dataset's labels: read what is there, extract the rest, keep what was extracted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.extract import Extractor
from opsd.affect.unibench.files import (
    Predictions,
    made_by,
    read_items,
    read_responses,
    usable,
    write_items,
    write_responses,
)


@dataclass(frozen=True)
class Labelled:
    """What is scored: lists of labels, or sentiments. `source` says who extracted it."""

    items: dict[str, Any]
    source: str


def labels_of(
    dataset: Dataset, found: Predictions, out: Predictions, extractor: Extractor, clips: Mapping[str, Any]
) -> Labelled:
    """The labels of every clip of `clips`, or their sentiments where the dataset is scored by valence.

    found: files that are given; out: where new ones go, and where those of an earlier, equal run are taken from.
    """
    if dataset.kind != "valence":
        return _openset(found, out, extractor, clips)
    for place in (found, out):
        if usable(place.sentiment, extractor.name):
            return Labelled(read_items(place.sentiment, clips), made_by(place.sentiment))
    openset = _openset(found, out, extractor, clips)
    items = extractor.sentiment(openset.items)
    write_items(out.sentiment, items, extractor.name)
    same = openset.source == extractor.name
    return Labelled(dict(items), extractor.name if same else f"{openset.source}, sentiment by {extractor.name}")


def _openset(found: Predictions, out: Predictions, extractor: Extractor, clips: Mapping[str, Any]) -> Labelled:
    for place in (found, out):
        if usable(place.openset, extractor.name):
            return Labelled(read_items(place.openset, clips), made_by(place.openset))
    responses = read_responses(found.responses, clips)
    if out.responses != found.responses:
        write_responses(out.responses, responses)  # so that the folder can be scored again by itself
    items = extractor.openset(responses)
    write_items(out.openset, items, extractor.name)
    return Labelled(dict(items), extractor.name)
