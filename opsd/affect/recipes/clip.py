"""What every recipe reads: clips; and what a recipe is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opsd.errors import InputError

SPLITS: Final = ("train", "validation", "test")
VIDEOS: Final = (".mp4", ".avi", ".mkv")


@dataclass(frozen=True)
class Clip:
    """One utterance. Media are where the layout says, whether or not the file is there."""

    id: str
    split: str  # of SPLITS
    label: str | None  # None: outside the task's labels, so no row, but still context of others
    video: Path | None  # None: the layout has no video of the clip
    audio: Path | None = None  # None: the video's own track
    subtitle: str = ""
    rationale: str = ""
    context: tuple[str, ...] = ()  # what was said before in the dialogue, "Speaker: words", oldest first


@dataclass(frozen=True)
class Recipe:
    """A dataset and how to read it. Without `labels` the options are those that occur; `open` has no options."""

    name: str
    title: str
    read: Callable[[Path, int], list[Clip]]  # (root, fold); raises InputError
    question: str
    labels: tuple[str, ...] = ()
    open: bool = False


def existing(root: Path, *candidates: str) -> Path:
    """The first candidate that exists below `root`. Raises `InputError` naming them all."""
    for candidate in candidates:
        if (root / candidate).exists():
            return root / candidate
    raise InputError(" or ".join(candidates), "none of them", file=root)


def medium(folder: Path, name: str, suffixes: tuple[str, ...] = VIDEOS) -> Path:
    """The file of a clip; when there is none, the path with the first suffix."""
    paths = [folder / f"{name}{suffix}" for suffix in suffixes]
    return next((path for path in paths if path.is_file()), paths[0])


def sound(folder: Path, name: str) -> Path | None:
    """The clip's own .wav, where there is one."""
    path = folder / f"{name}.wav"
    return path if path.is_file() else None


def polarity(valence: float) -> str:
    """The sentiment of a valence: its sign, as in WAF."""
    return "positive" if valence > 0 else "negative" if valence < 0 else "neutral"
