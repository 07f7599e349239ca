"""OV-MERD and OV-MERD+: any number of emotion words per clip.

    OV-MERD+ (test)    ovlabel.csv (name, openset), subtitle_eng.csv (name, sentence), video/NAME.mp4, audio/NAME.wav
    OV-MERD (train)    track2_train_ovmerd.csv (name, openset), track3_train_ovmerd.csv (name, reason),
                       subtitle_chieng.csv (name, english), video/NAME.mp4, audio/NAME.wav

The first is the benchmark's `ovmerdplus-process` (its dataset class), the second the MER2025 dataset on Hugging Face
(README and loaders of zeroQiaoba/AffectGPT). `reason`, a description of the clip and its emotions, becomes the
rationale. A folder may have both.
"""

from __future__ import annotations

from pathlib import Path

from opsd.affect.recipes.clip import Clip, existing, medium, sound
from opsd.affect.unibench.labels import split_labels
from opsd.affect.unibench.tables import read_table


def read_ovmerd(root: Path) -> list[Clip]:
    existing(root, "ovlabel.csv", "track2_train_ovmerd.csv")
    clips = []
    if (root / "track2_train_ovmerd.csv").is_file():
        reasons = _column(root / "track3_train_ovmerd.csv", "reason")
        clips += _read(
            root, "track2_train_ovmerd.csv", "train", _column(root / "subtitle_chieng.csv", "english"), reasons
        )
    if (root / "ovlabel.csv").is_file():
        clips += _read(root, "ovlabel.csv", "test", _column(root / "subtitle_eng.csv", "sentence"), {})
    return clips


def _read(root: Path, table: str, split: str, subtitles: dict[str, str], reasons: dict[str, str]) -> list[Clip]:
    clips = []
    for row in read_table(root / table, ("name", "openset")):
        name = row.text("name")
        clips.append(
            Clip(
                name,
                split,
                ", ".join(split_labels(row["openset"])) or None,
                medium(root / "video", name),
                sound(root / "audio", name),
                subtitles.get(name, ""),
                reasons.get(name, ""),
            )
        )
    return clips


def _column(path: Path, column: str) -> dict[str, str]:
    """Clip -> cell; nothing where the file is not there."""
    rows = read_table(path, ("name", column), literal=True) if path.is_file() else []
    return {row.text("name"): row[column].strip() for row in rows}
