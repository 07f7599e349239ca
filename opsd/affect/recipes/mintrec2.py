"""MIntRec 2.0 (thuiar/MIntRec2.0): the intent of an utterance in a multi-party dialogue.

    train.tsv  dev.tsv  test.tsv     in ROOT, in-scope/ or text_data/
    dia0_utt0.mp4 and so on          in video_data/, raw_data/, raw_video/ or video/

The columns are taken by position, as the official loader takes them: dialogue, utterance, text, label; a public loader
names the eighth `speaker_name`. Utterances labelled UNK are out of scope and give no row. Uncertain: the name of the
folder that the raw videos unpack into, which the README does not say; the names above are tried, then ROOT itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from opsd.affect.recipes.clip import Clip, existing, medium
from opsd.affect.unibench.tables import read_table
from opsd.errors import InputError

INTENTS: Final = (
    *("Acknowledge", "Advise", "Agree", "Apologise", "Arrange", "Ask for help", "Asking for opinions", "Care"),
    *("Comfort", "Complain", "Confirm", "Criticize", "Doubt", "Emphasize", "Explain", "Flaunt", "Greet", "Inform"),
    *(
        "Introduce",
        "Invite",
        "Joke",
        "Leave",
        "Oppose",
        "Plan",
        "Praise",
        "Prevent",
        "Refuse",
        "Taunt",
        "Thank",
        "Warn",
    ),
)
OUT_OF_SCOPE: Final = "UNK"
_SPEAKER: Final = 7  # its column


def read_mintrec2(root: Path) -> list[Clip]:
    videos = existing(root, "video_data", "raw_data", "raw_video", "video", ".")
    clips: list[Clip] = []
    for split, short in (("train", "train"), ("validation", "dev"), ("test", "test")):
        table = existing(root, f"{short}.tsv", f"in-scope/{short}.tsv", f"text_data/{short}.tsv")
        said: dict[str, list[str]] = {}
        for row in read_table(table, (), literal=True):
            names = list(row.cells)
            if len(names) < 4:
                raise InputError("dialogue, utterance, text and label", ", ".join(names), file=table, line=1)
            dialogue, utterance, words, label = (row[name].strip() for name in names[:4])
            if label != OUT_OF_SCOPE and label not in INTENTS:
                raise row.problem(names[3], f"one of the {len(INTENTS)} intents, or {OUT_OF_SCOPE}", repr(label))
            name = f"dia{dialogue}_utt{utterance}"
            before = said.setdefault(dialogue, [])
            known = None if label == OUT_OF_SCOPE else label
            clips.append(
                Clip(f"{short}_{name}", split, known, medium(videos, name), None, words, context=tuple(before))
            )
            speaker = row[names[_SPEAKER]].strip() if len(names) > _SPEAKER else ""
            before.append(f"{speaker or 'Someone'}: {words}")
    return clips
