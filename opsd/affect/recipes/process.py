"""The preprocessed folders of MER-UniBench (`meld-process` and so on), with their training and validation clips.

Layout: `opsd.affect.unibench.datasets`, and zeroQiaoba/MERTools, toolkit/preprocess, which writes `train_corpus`,
`val_corpus` and `test_corpus` (MER: `test1_corpus`) into the label file; IEMOCAP has `whole_corpus`.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from opsd.affect.recipes.clip import Clip, medium, polarity, sound
from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.npz import has_array
from opsd.affect.unibench.tables import read_table
from opsd.affect.unibench.truth import read_truth
from opsd.errors import InputError


def is_process(dataset: Dataset, root: Path) -> bool:
    return (root / dataset.labels).is_file()


def read_process(dataset: Dataset, root: Path) -> list[Clip]:
    """The clips of a `*-process` folder. A missing subtitle file is an error: the benchmark's scripts write one."""
    rows = read_table(root / dataset.subtitles, ("name", dataset.language), literal=True)
    subtitles = {row.text("name"): row[dataset.language].strip() for row in rows}
    clips = []
    for split, part in _parts(dataset, root):
        for name, truth in read_truth(replace(part, folder=""), root).items():
            clips.append(
                Clip(
                    name,
                    split,
                    polarity(truth) if dataset.kind == "valence" else truth,
                    medium(root / dataset.video, name),
                    sound(root / dataset.audio, name),
                    subtitles.get(name, ""),
                )
            )
    return clips


def _parts(dataset: Dataset, root: Path) -> list[tuple[str, Dataset]]:
    if dataset.session is not None:
        train = [("train", replace(dataset, session=number)) for number in "1234"]
        return [*train, ("test", dataset)]
    named = (("train", "train_corpus"), ("validation", "val_corpus"), ("test", dataset.corpus))
    found = [
        (split, replace(dataset, corpus=corpus)) for split, corpus in named if has_array(root / dataset.labels, corpus)
    ]
    if not found:
        raise InputError("train_corpus, val_corpus or test_corpus", "none of them", file=root / dataset.labels)
    return found
