"""What a model said, in the official layout, in and out.

    DIR/results-DATASET/[MODEL/]STEM.npz                          name2reason: clip -> response
    DIR/results-DATASET/[MODEL/]STEM-openset.npz                  filenames, fileitems: clip -> list of labels, as text
    DIR/results-DATASET/[MODEL/]STEM-openset-sentiment.npz        the same: clip -> positive, negative or neutral

STEM is a checkpoint's name. Files that this program writes also have `task` and `model`, or `extractor` and `source`,
which the official script ignores and which keep apart what was made in different ways, or of different responses.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.npz import has_array, read_npz
from opsd.errors import InputError, writing

OPENSET: Final = "-openset"
SENTIMENT: Final = "-openset-sentiment"
OFFICIAL: Final = "official file"


@dataclass(frozen=True)
class Predictions:
    """The files of one checkpoint on one dataset; the first of them that exists is enough."""

    folder: Path
    stem: str

    @property
    def responses(self) -> Path:
        return self.folder / f"{self.stem}.npz"

    @property
    def openset(self) -> Path:
        return self.folder / f"{self.stem}{OPENSET}.npz"

    @property
    def sentiment(self) -> Path:
        return self.folder / f"{self.stem}{SENTIMENT}.npz"


def find_predictions(folder: Path, dataset: Dataset, model: str | None, checkpoint: str) -> list[Predictions]:
    """The checkpoints to score: the last by name, the one that `checkpoint` begins, or for "best" all of them.

    Raises `InputError` when there is none, and when there are several models and none is named.
    """
    home = folder / f"results-{dataset.name}"
    if not home.is_dir():
        raise InputError(f"a folder results-{dataset.name}", "none", file=folder)
    homes = [home, *sorted(path for path in home.iterdir() if path.is_dir())]
    found = [place for place in homes if any(place.glob("*.npz")) and model in (None, place.name)]
    if not found:
        raise InputError("responses (.npz)" if model is None else f"responses of {model!r}", "none", file=home)
    if len(found) > 1:
        names = ", ".join(place.name for place in found)
        raise InputError("one model", names, file=home, hint="name it with --name")
    stems = sorted({path.stem.removesuffix(SENTIMENT).removesuffix(OPENSET) for path in found[0].glob("*.npz")})
    if checkpoint == "last":
        stems = stems[-1:]
    elif checkpoint != "best":
        fitting = [stem for stem in stems if stem == checkpoint or stem.startswith(f"{checkpoint}_")]
        if len(fitting) != 1:
            raise InputError(f"one of {', '.join(stems)}", repr(checkpoint), file=found[0], field="--checkpoint")
        stems = fitting
    return [Predictions(found[0], stem) for stem in stems]


def read_responses(path: Path, clips: Iterable[str]) -> dict[str, str]:
    """Clip -> response, for every clip."""
    (responses,) = read_npz(path, "name2reason")
    if not isinstance(responses, dict):
        raise InputError("a dictionary", type(responses).__name__, file=path, field="name2reason")
    wanted = _select(path, "name2reason", responses, clips)
    for name, text in wanted.items():
        if not isinstance(text, str):
            raise InputError(f"text for clip {name!r}", repr(text), file=path, field="name2reason")
    return {name: str(text) for name, text in wanted.items()}


def read_items(path: Path, clips: Iterable[str]) -> dict[str, Any]:
    """Clip -> what was extracted, for every clip."""
    names, items = read_npz(path, "filenames", "fileitems")
    for array, found in (("filenames", names), ("fileitems", items)):
        if not isinstance(found, list):
            raise InputError("one entry per clip", type(found).__name__, file=path, field=array)
    if len(names) != len(items):
        raise InputError(f"{len(names)} items, one per clip", f"{len(items)}", file=path, field="fileitems")
    by_name: dict[str, Any] = {}
    for name, item in zip(map(str, names), items, strict=True):
        if name in by_name:
            raise InputError("every clip once", f"{name!r} twice", file=path, field="filenames")
        by_name[name] = item
    return _select(path, "filenames", by_name, clips)


def usable(path: Path, extractor: str, source: str) -> bool:
    """Whether a file has what this extractor made of what has this `digest`."""
    return path.is_file() and made_by(path) == extractor and str(read_npz(path, "source")[0]) == source


def digest(texts: Mapping[str, Any]) -> str:
    """A name for the texts of all clips, which changes when one of them does."""
    return hashlib.sha256(repr(sorted((name, str(text)) for name, text in texts.items())).encode()).hexdigest()


def made_by(path: Path) -> str:
    """The extractor of a file of labels; a file that names none is an official one."""
    return str(read_npz(path, "extractor")[0]) if has_array(path, "extractor") else OFFICIAL


def write_responses(path: Path, responses: Mapping[str, str], task: str = "", model: str = "") -> None:
    """name2reason, as the official inference script stores it, what the model was given and asked, and which it was."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        np.savez_compressed(path, name2reason=np.array(dict(responses), dtype=object), task=task, model=model)


def noted(path: Path, array: str) -> str:
    """`task` or `model` of a file of responses that this program wrote; "" for others."""
    return str(read_npz(path, array)[0]) if has_array(path, array) else ""


def write_items(path: Path, items: Mapping[str, str], extractor: str, source: str) -> None:
    """filenames and fileitems, as the official script stores them, who extracted them, and the digest of what from."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with writing(path):
        np.savez_compressed(
            path, filenames=list(items), fileitems=list(items.values()), extractor=extractor, source=source
        )


def _select(path: Path, array: str, found: Mapping[str, Any], clips: Iterable[str]) -> dict[str, Any]:
    wanted = list(clips)
    missing = [name for name in wanted if name not in found]
    if missing:
        raise InputError(
            f"all {len(wanted)} test clips", f"{len(missing)} missing, such as {missing[0]!r}", file=path, field=array
        )
    return {name: found[name] for name in wanted}
