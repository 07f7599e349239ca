"""MELD, as MELD.Raw.tar.gz unpacks (declare-lab/MELD).

    train_sent_emo.csv  dev_sent_emo.csv  test_sent_emo.csv     in ROOT, or in train/ dev/ test/
    train_splits/  dev_splits_complete/  output_repeated_splits_test/     the same; dia0_utt0.mp4 and so on

Columns, from the CSV headers: Utterance, Speaker, Emotion, Sentiment, Dialogue_ID, Utterance_ID. Learnt from loaders of
public repositories, which unpack into either place. Broken videos, according to zeroQiaoba/MERTools: train/dia125_utt3
and test/dia279_utt15.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing, medium
from opsd.affect.unibench.tables import read_table

EMOTIONS: Final = ("anger", "disgust", "fear", "joy", "neutral", "sadness", "surprise")
_COLUMNS: Final = ("Utterance", "Speaker", "Emotion", "Dialogue_ID", "Utterance_ID")
_SPLITS: Final = (
    ("train", "train", "train_splits"),
    ("validation", "dev", "dev_splits_complete"),
    ("test", "test", "output_repeated_splits_test"),
)


def read_meld(root: Path) -> list[Clip]:
    clips: list[Clip] = []
    for split, short, folder in _SPLITS:
        table = existing(root, f"{short}_sent_emo.csv", f"{short}/{short}_sent_emo.csv")
        videos = existing(root, f"{short}/{folder}", folder)
        said: dict[str, list[str]] = {}
        for row in read_table(table, _COLUMNS, literal=True):
            dialogue, words = row.text("Dialogue_ID"), row["Utterance"].strip()
            emotion = row.text("Emotion").lower()
            if emotion not in EMOTIONS:
                raise row.problem("Emotion", f"one of {', '.join(EMOTIONS)}", repr(emotion))
            name = f"dia{dialogue}_utt{row.text('Utterance_ID')}"
            before = said.setdefault(dialogue, [])
            clips.append(
                Clip(f"{short}_{name}", split, emotion, medium(videos, name), None, words, context=tuple(before))
            )
            before.append(f"{row['Speaker'].strip()}: {words}")
    return clips
