"""MC-EIU: emotion and intent of an utterance in a dialogue, English and Mandarin.

    MC-EIU_label.csv     video_id, Subtitle, emotion, intent, mode (train, validation, test)
    video/VIDEO_ID.mkv   or .mp4

As the evaluation code of Emotion-LLaMAv2 reads it (MMEVerse). Uncertain: the authors' own archive (MC-EIU/MC-EIU) is
described by its feature files only, so a copy from there may need its table brought into these columns. Names are
DIALOGUE_..._TURN; the order of a dialogue is not relied on, so there is no context.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing, medium
from opsd.affect.unibench.tables import read_table

EMOTIONS: Final = ("anger", "disgust", "fear", "happy", "neutral", "sad", "surprise")
_MODES: Final = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


def _read(target: str, root: Path) -> list[Clip]:
    table = existing(root, "MC-EIU_label.csv", "label.csv")
    clips = []
    for row in read_table(table, ("video_id", "Subtitle", target, "mode"), literal=True):
        name, label, mode = row.text("video_id"), row.text(target).lower(), row.text("mode").lower()
        if mode not in _MODES:
            raise row.problem("mode", f"one of {', '.join(_MODES)}", repr(mode))
        if target == "emotion" and label not in EMOTIONS:
            raise row.problem(target, f"one of {', '.join(EMOTIONS)}", repr(label))
        video = medium(root / "video", name, (".mkv", ".mp4"))
        clips.append(Clip(name, _MODES[mode], label, video, None, row["Subtitle"].strip()))
    return clips


read_emotion = partial(_read, "emotion")
read_intent = partial(_read, "intent")
