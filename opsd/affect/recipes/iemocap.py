"""IEMOCAP, as IEMOCAP_full_release unpacks (USC SAIL); four emotions, session 5 for test.

    Session1/dialog/EmoEvaluation/Ses01F_impro01.txt
        lines  [6.2901 - 8.2357] TAB Ses01F_impro01_F000 TAB neu TAB [2.5000, 2.5000, 2.5000]
    Session1/dialog/transcriptions/Ses01F_impro01.txt
        lines  Ses01F_impro01_F000 [006.2901-008.2357]: Excuse me.
    Session1/sentences/wav/Ses01F_impro01/Ses01F_impro01_F000.wav
    subvideo-tgt/Ses01F_impro01_F000.avi                  optional

Learnt from the release's README and from loaders of public repositories. The release has videos of whole dialogues
with both actors in view; clips of the speaker come from the preprocessing of zeroQiaoba/MERTools (`subvideo-tgt`, or
`subvideo` with both). Where neither folder is there, rows have sound and words only. Excited counts as happy; other
emotions and undecided turns (xxx) give no row.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing, medium
from opsd.errors import InputError

EMOTIONS: Final = ("happy", "sad", "neutral", "anger")
_CODES: Final = {"hap": "happy", "exc": "happy", "sad": "sad", "neu": "neutral", "ang": "anger"}
_EVALUATION: Final = re.compile(r"\[[\d.]+ - [\d.]+\]\t(\S+)\t(\w+)\t")
_TURN: Final = re.compile(r"(Ses\w+_[FM]\w+) \[[\d.]+-[\d.]+\]:(.*)")
_SPEAKERS: Final = {"F": "Woman", "M": "Man"}


def read_iemocap(root: Path) -> list[Clip]:
    videos = next((root / name for name in ("subvideo-tgt", "subvideo") if (root / name).is_dir()), None)
    clips: list[Clip] = []
    for number in range(1, 6):
        session = existing(root, f"Session{number}")
        split = "test" if number == 5 else "train"
        for path in _texts(session / "dialog" / "EmoEvaluation"):
            labels = dict(_EVALUATION.findall(_read(path)))
            turns = _TURN.findall(_read(session / "dialog" / "transcriptions" / path.name))
            before: list[str] = []
            for name, words in turns:
                if name in labels:
                    wav = session / "sentences" / "wav" / path.stem / f"{name}.wav"
                    video = medium(videos, name, (".avi", ".mp4")) if videos else None
                    label = _CODES.get(labels[name])
                    clips.append(Clip(name, split, label, video, wav, words.strip(), context=tuple(before)))
                before.append(f"{_SPEAKERS[name.rpartition('_')[2][0]]}: {words.strip()}")
    return clips


def _texts(folder: Path) -> list[Path]:
    """The text files of a folder, without those that other systems leave behind (._Ses01F_impro01.txt)."""
    found = sorted(path for path in folder.glob("*.txt") if not path.name.startswith("."))
    if not found:
        raise InputError("one .txt file per dialogue", "none", file=folder)
    return found


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError("a readable text file", error.strerror or str(error), file=path) from error
