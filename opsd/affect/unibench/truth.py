"""Ground truth of a test set, from the benchmark's preprocessed folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from opsd.affect.unibench.datasets import Dataset
from opsd.affect.unibench.labels import split_labels
from opsd.affect.unibench.npz import read_npz
from opsd.affect.unibench.tables import read_table
from opsd.errors import InputError, did_you_mean


def read_truth(dataset: Dataset, data: Path) -> dict[str, Any]:
    """Clip -> its label (discrete), its valence (float), or its labels as text (open), in file order.

    Raises `InputError` naming the file, and the clip as the field.
    """
    path = data / dataset.folder / dataset.labels
    if dataset.kind == "open":
        return _open_labels(path)
    (corpus,) = read_npz(path, dataset.corpus)
    if not isinstance(corpus, dict) or not corpus:
        raise InputError("a dictionary of clips", type(corpus).__name__, file=path, field=dataset.corpus)
    clips = {name: entry for name, entry in corpus.items() if dataset.session in (None, str(name)[4:5])}
    if not clips:
        raise InputError(f"clips of session {dataset.session}", "none", file=path, field=dataset.corpus)
    read = _valence if dataset.kind == "valence" else _label
    return {str(name): read(dataset, path, str(name), entry) for name, entry in clips.items()}


def _open_labels(path: Path) -> dict[str, str]:
    """An empty list counts as neutral, which no wheel knows."""
    rows = read_table(path, ("name", "openset"))
    if not rows:
        raise InputError("at least one clip", "none", file=path)
    return {row.text("name"): ", ".join(split_labels(row["openset"]) or ["neutral"]) for row in rows}


def _label(dataset: Dataset, path: Path, name: str, entry: Any) -> str:
    value = _field(path, name, entry, "emo")
    if isinstance(value, int) and not isinstance(value, bool) and 0 <= value < len(dataset.codes):
        return dataset.codes[value]
    if not isinstance(value, str) or not value.strip():
        expected = f"a label, or its number below {len(dataset.codes)}" if dataset.codes else "a label"
        raise InputError(expected, repr(value), file=path, field=f"{dataset.corpus}[{name!r}]['emo']")
    return value


def _valence(dataset: Dataset, path: Path, name: str, entry: Any) -> float:
    value = _field(path, name, entry, "val")
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError("a number", repr(value), file=path, field=f"{dataset.corpus}[{name!r}]['val']")
    return number


def _field(path: Path, name: str, entry: Any, key: str) -> Any:
    if not isinstance(entry, dict) or key not in entry:
        found = f"keys {', '.join(map(str, entry))}" if isinstance(entry, dict) else type(entry).__name__
        raise InputError(f"a dictionary with {key!r}", found, file=path, field=name)
    value = entry[key]
    return value.item() if hasattr(value, "item") else value


def choose_datasets(names: str | None, known: dict[str, Dataset]) -> list[Dataset]:
    """The datasets of a comma-separated list; all of them for None."""
    if names is None:
        return list(known.values())
    chosen = [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise InputError(
                f"some of {', '.join(known)}", repr(name), field="--datasets", hint=did_you_mean(name, known)
            )
    if not chosen:
        raise InputError(f"some of {', '.join(known)}", "none", field="--datasets")
    return [known[name] for name in dict.fromkeys(chosen)]
