"""MAFW: eleven emotions in film clips, with a sentence on what is seen (cvlab-liuyuanyuan).

    data/clips/00001.mp4, or clips/
    Train & Test Set/single/no_caption/set_1/train.txt, test.txt       00001.mp4 anger
    Train & Test Set/single/with_caption/set_1/train.txt, test.txt     00001.mp4 TAB anger TAB Chinese TAB English

Five folds, set_1 to set_5. From the README of MAFW-database/MAFW and loaders of public repositories. The English
caption becomes the rationale; neutral clips have none. The captioned files are not all UTF-8: what cannot be decoded,
which is in the Chinese column, is replaced. The captions name what the face does, not the label.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing
from opsd.errors import InputError

EMOTIONS: Final = (
    *("anger", "disgust", "fear", "happiness", "neutral", "sadness", "surprise", "contempt", "anxiety"),
    *("helplessness", "disappointment"),
)
FOLDS: Final = 5


def read_mafw(root: Path, fold: int) -> list[Clip]:
    if not 1 <= fold <= FOLDS:
        raise InputError(f"a fold from 1 to {FOLDS}", str(fold), field="--fold")
    home = existing(root, "Train & Test Set", "train_test_set/Train & Test Set") / "single"
    videos = existing(root, "data/clips", "clips")
    clips = []
    for split in ("train", "test"):
        captions = _captions(home / "with_caption" / f"set_{fold}" / f"{split}.txt")
        path = home / "no_caption" / f"set_{fold}" / f"{split}.txt"
        for number, line in enumerate(_lines(path), start=1):
            file, _, label = line.partition(" ")
            if label not in EMOTIONS:
                raise InputError(f"CLIP.mp4 and one of {', '.join(EMOTIONS)}", repr(line), file=path, line=number)
            clips.append(Clip(Path(file).stem, split, label, videos / file, rationale=captions.get(file, "")))
    return clips


def _captions(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    parts = [line.split("\t") for line in _lines(path)]
    return {cells[0]: cells[-1].strip() for cells in parts if len(cells) >= 4}


def _lines(path: Path) -> list[str]:
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
    except OSError as error:
        raise InputError("a readable split file", error.strerror or str(error), file=path) from error
