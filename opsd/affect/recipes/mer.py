"""MER2023 and MER2024 (merchallenge.cn), six emotions.

    MER2023   train-label.csv  test1-label.csv ... test3-label.csv     columns name, discrete, valence
              train/  test1/ ... test3/                                NAME.avi or NAME.mp4
    MER2024   label-disdim.csv, video-labeled/                         columns name, discrete; the training set

From zeroQiaoba/MERTools, toolkit/preprocess/mer2023.py and mer2024.py. The labels of MER2024's test clips are not
published with the videos; they are in the benchmark's preprocessed folder, which is read as well. A subtitle file
(name, chinese) is optional here: the scripts do not say where the challenge's own archives keep it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing, medium
from opsd.affect.unibench.tables import read_table

EMOTIONS: Final = ("neutral", "angry", "happy", "sad", "worried", "surprise")
_SUBTITLES: Final = ("transcription-engchi-polish.csv", "transcription_merge.csv", "transcription.csv")


def read_mer2023(root: Path) -> list[Clip]:
    existing(root, "train-label.csv")
    clips = []
    for folder in ("train", "test1", "test2", "test3"):
        if (root / f"{folder}-label.csv").is_file():
            split = "train" if folder == "train" else "test"
            clips += _read(
                root, f"{folder}-label.csv", existing(root, folder), split, f"{folder}_" if split == "test" else ""
            )
    return clips


def read_mer2024(root: Path) -> list[Clip]:
    return _read(root, "label-disdim.csv", existing(root, "video-labeled", "video"), "train", "")


def _read(root: Path, table: str, videos: Path, split: str, prefix: str) -> list[Clip]:
    subtitles = _subtitles(root)
    clips = []
    for row in read_table(existing(root, table), ("name", "discrete"), literal=True):
        name, emotion = row.text("name"), row.text("discrete")
        if emotion not in EMOTIONS:
            raise row.problem("discrete", f"one of {', '.join(EMOTIONS)}", repr(emotion))
        video = medium(videos, name, (".avi", ".mp4"))
        clips.append(Clip(f"{prefix}{name}", split, emotion, video, None, subtitles.get(name, "")))
    return clips


def _subtitles(root: Path) -> dict[str, str]:
    path = next((root / name for name in _SUBTITLES if (root / name).is_file()), None)
    rows = read_table(path, ("name", "chinese"), literal=True) if path else []
    return {row.text("name"): row["chinese"].strip() for row in rows}
