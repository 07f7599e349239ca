"""Clips as rows, and what there is to say about them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from opsd.affect.recipes.clip import SPLITS, Clip, Recipe

MEDIA: Final = ("video", "audio", "text")


@dataclass(frozen=True)
class Style:
    """What a row shows: media, the number of turns before the clip, and the question (None: the recipe's own)."""

    media: tuple[str, ...] = MEDIA
    context: int = 0
    question: str | None = None


def media_of(clip: Clip, style: Style) -> list[tuple[str, Path]]:
    """(kind, path) of the clip's parts. Sound without a file of its own is the video's track."""
    found = [("video", clip.video), ("audio", clip.audio or clip.video)]
    return [(kind, path.absolute()) for kind, path in found if path is not None and kind in style.media]


def row_of(clip: Clip, recipe: Recipe, style: Style, labels: Sequence[str]) -> dict[str, Any]:
    """One row of `opsd.rows`."""
    parts: list[dict[str, Any]] = [{"type": kind, kind: str(path)} for kind, path in media_of(clip, style)]
    parts.append({"type": "text", "text": _task(clip, recipe, style, labels)})
    row: dict[str, Any] = {"id": clip.id, "prompt": [{"role": "user", "content": parts}]}
    shown = {"subtitle": clip.subtitle if "text" in style.media else "", "rationale": clip.rationale}
    return {**row, **{name: text for name, text in shown.items() if text}, "label": clip.label}


def _task(clip: Clip, recipe: Recipe, style: Style, labels: Sequence[str]) -> str:
    turns = clip.context[-style.context :] if style.context and "text" in style.media else ()
    before = "".join(f"{turn}\n" for turn in turns)
    question = style.question or recipe.question
    options = "" if recipe.open else f" Answer with one of: {', '.join(labels)}."
    return (f"Before this clip was said:\n{before}\n" if before else "") + question + options


def options(recipe: Recipe, clips: Sequence[Clip]) -> list[str]:
    """The labels of the question: the recipe's, or, where it has none, those that occur in any split."""
    return list(recipe.labels) or sorted({clip.label for clip in clips if clip.label})


def missing(clip: Clip, style: Style) -> list[Path]:
    return list(dict.fromkeys(path for _, path in media_of(clip, style) if not path.is_file()))


def describe(recipe: Recipe, clips: Sequence[Clip], style: Style) -> Iterator[str]:
    """Counts per split and label, and the files that are not there."""
    for split in SPLITS:
        chosen = [clip for clip in clips if clip.split == split]
        if not chosen:
            continue
        labelled = [clip for clip in chosen if clip.label]
        counts = Counter(clip.label for clip in labelled)
        shown = ", ".join(f"{label} {n}" for label, n in counts.most_common(12)) + (", ..." if len(counts) > 12 else "")
        yield f"{recipe.title}, {split}: {len(labelled)} clips ({shown or 'no labels'})"
        yield f"  left out, without a label of the task: {len(chosen) - len(labelled)}"
        yield f"  with a rationale: {sum(bool(clip.rationale) for clip in labelled)}"
        if "video" in style.media:
            yield f"  without video in this layout: {sum(clip.video is None for clip in labelled)}"
        gone = [path for clip in labelled for path in missing(clip, style)]
        yield f"  missing files: {len(gone)}" + "".join(f"\n    {path}" for path in gone[:5])
