"""CMU-MOSI, CMU-MOSEI, CH-SIMS and CH-SIMS v2, as thuiar publishes them for MMSA; sentiment is the sign of the valence.

    label.csv, or meta.csv for CH-SIMS v2     video_id, clip_id, text, label, mode (train, valid, test)
    Raw/VIDEO/CLIP.mp4

From the MMSA-FET wiki (Dataset and Structure) and toolkit/preprocess of zeroQiaoba/MERTools, which also has the first
CH-SIMS release: metadata/sentiment/label_M.csv, metadata/{train,val,test}_index.csv (column index, rows counted from
0), metadata/Translation.csv (Chinese). Clip numbers come padded to four digits or not, so both names are tried.
Uncertain: the CMU releases themselves have labels in .csd files, which are not read.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing, polarity
from opsd.affect.unibench.tables import Row, read_table

SENTIMENTS: Final = ("positive", "negative", "neutral")
_MODES: Final = {"train": "train", "valid": "validation", "val": "validation", "test": "test"}


def read_msa(root: Path) -> list[Clip]:
    if (root / "metadata" / "sentiment" / "label_M.csv").is_file():
        return _first_release(root)
    table = existing(root, "label.csv", "meta.csv")
    clips = []
    for row in read_table(table, ("video_id", "clip_id", "text", "label", "mode"), literal=True):
        mode = row.text("mode").lower()
        if mode not in _MODES:
            raise row.problem("mode", f"one of {', '.join(_MODES)}", repr(mode))
        clips.append(_clip(root, row, _MODES[mode], row["text"]))
    return clips


def _first_release(root: Path) -> list[Clip]:
    home = root / "metadata"
    labels = read_table(home / "sentiment" / "label_M.csv", ("video_id", "clip_id", "label"), literal=True)
    words = {}
    if (home / "Translation.csv").is_file():
        rows = read_table(home / "Translation.csv", ("video_id", "clip_id", "Chinese"), literal=True)
        words = {(row["video_id"], row["clip_id"]): row["Chinese"] for row in rows}
    clips = []
    for split, short in (("train", "train"), ("validation", "val"), ("test", "test")):
        for index in read_table(existing(home, f"{short}_index.csv"), ("index",)):
            at = int(index["index"]) if index["index"].isdigit() else -1
            if not 0 <= at < len(labels):
                raise index.problem("index", f"a row of label_M.csv, 0 to {len(labels) - 1}", repr(index["index"]))
            row = labels[at]
            clips.append(_clip(root, row, split, words.get((row["video_id"], row["clip_id"]), "")))
    return clips


def _clip(root: Path, row: Row, split: str, words: str) -> Clip:
    video, clip = row.text("video_id"), row.text("clip_id")
    names = (f"{clip}.mp4", f"{clip.zfill(4)}.mp4")
    folder = root / "Raw" / video
    path = next((folder / name for name in names if (folder / name).is_file()), folder / names[0])
    try:
        valence = float(row["label"])
    except ValueError:
        valence = math.nan
    if not math.isfinite(valence):
        raise row.problem("label", "a number", repr(row["label"]))
    return Clip(f"{video}_{clip}", split, polarity(valence), path, None, words.strip())
