"""Rows of text cues for six emotions: what a face does, how a voice sounds, and words that settle nothing.

    python examples/smollm2/rows.py runs/smollm2/data

writes train, validation, test and wording .jsonl. The student reads the two cues; the rationale says which of them
counts and how such a person stands to what happens (wronged, in danger, ...), never the emotion's name. In a third of
the rows the face shows nothing, in a third the voice.

Held out are combinations: no face stands beside the same voice in two of train, validation and test, and neither of the
latter has a subtitle of train. `wording` holds cues whose words train has nowhere.
"""

from __future__ import annotations

import json
import random
import sys
from itertools import product
from pathlib import Path
from typing import Final, NamedTuple

LABELS: Final = ("happy", "sad", "angry", "afraid", "surprised", "disgusted")


class Emotion(NamedTuple):
    """The cues of a label. The last NEW of each kind are in `wording` alone."""

    faces: tuple[str, ...]
    voices: tuple[str, ...]
    stands: tuple[str, ...]  # how a rationale says it
    thought: str  # how an answer says it


NEW: Final = 2
SEED: Final = 0
SHARES: Final = {"train": 0.5, "validation": 0.125, "test": 0.375}  # of the combinations

EMOTIONS: Final = {
    "happy": Emotion(
        (
            "a broad grin",
            "dimples on both sides",
            "beaming from ear to ear",
            "a glow in the eyes",
            "cheeks lifted high",
            "lips curling up by themselves",
        ),
        (
            "laughing",
            "almost singing",
            "warm and bright",
            "a chuckle under the words",
            "light and bouncing",
            "humming between sentences",
        ),
        (
            "somebody who got what was hoped for",
            "somebody whose wish came true",
            "a person for whom all goes well",
            "a person who would like this moment to last",
        ),
        "a wish came true",
    ),
    "sad": Emotion(
        (
            "tears on the cheeks",
            "gaze resting on the floor",
            "mouth corners sinking",
            "eyelids heavy and wet",
            "a lower lip that quivers",
            "chin down on the chest",
        ),
        (
            "sobbing",
            "long sighs between the words",
            "slow, fading at the ends",
            "thick and choked",
            "weary and toneless",
            "each word dragged along",
        ),
        (
            "somebody who has lost what was dear",
            "somebody left alone with a loss",
            "a person who must say goodbye for good",
            "a person who has nothing left to hope for",
        ),
        "something dear is lost",
    ),
    "angry": Emotion(
        (
            "a glare",
            "teeth clenched",
            "jaw set hard",
            "brows pulled down",
            "nostrils flared",
            "lips pressed into a white line",
        ),
        (
            "shouting",
            "a low growl",
            "every word bitten off",
            "loud, with a hard edge",
            "snapping at the others",
            "short, sharp bursts",
        ),
        (
            "somebody who was treated unfairly",
            "somebody who has been wronged and will not take it",
            "a person who wants to hit back at an insult",
            "a person whose way was blocked on purpose",
        ),
        "this was unfair",
    ),
    "afraid": Emotion(
        (
            "trembling all over",
            "a frozen stare",
            "colour gone from the cheeks",
            "glances darting to the door",
            "a cold sweat on the forehead",
            "cowering behind raised hands",
        ),
        (
            "a scream for help",
            "thin and shaking",
            "pleading",
            "a stammer on each first sound",
            "a high whisper",
            "breath held between the words",
        ),
        (
            "somebody who is in danger",
            "somebody who sees a threat come near",
            "a person who wants to get away to safety",
            "a person who may be hurt at any moment",
        ),
        "there is danger",
    ),
    "surprised": Emotion(
        ("jaw dropped", "brows shot up", "a double take", "eyes round and blinking", "head jerked back", "gaping"),
        (
            "a gasp, then words",
            "stunned",
            "a drawn-out oh",
            "a leap in pitch",
            "a squeak on the first word",
            "crying out what, what",
        ),
        (
            "somebody who did not see this coming",
            "somebody who had counted on something else",
            "a person who learns this just now, out of nowhere",
            "a person for whom this has come all of a sudden",
        ),
        "nobody expected this",
    ),
    "disgusted": Emotion(
        (
            "nose wrinkled",
            "gagging",
            "upper lip curled",
            "a sneer at the plate",
            "tongue pushed out a little",
            "head turned aside, nose held",
        ),
        (
            "a long ugh",
            "yuck, said twice",
            "a retching sound",
            "a groan of eww",
            "spitting out the syllables",
            "a throaty bah",
        ),
        (
            "somebody who wants this foul thing away",
            "somebody who would not touch this with a finger",
            "a person who finds this rotten and dirty",
            "a person who cannot stand the smell or sight of it",
        ),
        "this is foul",
    ),
}
BLANK_FACES: Final = ("a polite nod", "half hidden by a hand", "turned from the camera", "without any movement")
BLANK_VOICES: Final = ("even and unhurried", "drowned by the traffic", "plain and steady", "hardly to be heard")
SUBTITLES: Final = (
    "Well, here we are.",
    "So that is what you did.",
    "Look at this.",
    "You said it would be today.",
    "It is on the table.",
    "They have all come.",
    "That was the last one.",
    "Say that again.",
)
NEW_SUBTITLES: Final = ("It is you.", "I have read the letter.", "So soon.", "Come and see for yourself.")
FRAMES: Final = (
    "What counts here is the {kind}: {cue}. That is {stand}.",
    "{cue}: so the {kind} shows {stand}.",
    "Mind the {kind}, {cue}. One meets {stand}.",
)
QUESTION: Final = "Which emotion is it?"


class Clip(NamedTuple):
    label: str
    face: str
    voice: str

    @property
    def telling(self) -> dict[str, str]:
        """The cues that show something."""
        cues = {"face": self.face, "voice": self.voice}
        return {kind: cue for kind, cue in cues.items() if cue not in BLANK_FACES + BLANK_VOICES}


def combinations(label: str, new: bool) -> list[Clip]:
    """Every face beside every voice of a label, one of them blank or none; of the wordings in train, or of the new."""
    emotion = EMOTIONS[label]
    part = slice(-NEW, None) if new else slice(None, -NEW)
    faces, voices = emotion.faces[part], emotion.voices[part]
    pairs = [*product(faces, voices), *product(faces, BLANK_VOICES), *product(BLANK_FACES, voices)]
    return [Clip(label, face, voice) for face, voice in pairs]


def splits() -> dict[str, list[Clip]]:
    """The clips of every file, labels balanced, in random order."""
    rng = random.Random(SEED)
    files: dict[str, list[Clip]] = {name: [] for name in (*SHARES, "wording")}
    for label in LABELS:
        clips = combinations(label, new=False)
        rng.shuffle(clips)
        start = 0.0
        for name, share in SHARES.items():
            files[name] += clips[round(start * len(clips)) : round((start + share) * len(clips))]
            start += share
        files["wording"] += combinations(label, new=True)
    for clips in files.values():
        rng.shuffle(clips)
    return files


def row(name: str, clip: Clip, rng: random.Random) -> dict[str, str]:
    """A row of `opsd.rows`: two cues and a question; rationale, label and answer are what only training may use."""
    emotion = EMOTIONS[clip.label]
    kind, cue = rng.choice(sorted(clip.telling.items()))
    words = rng.choice(SUBTITLES if name == "train" else NEW_SUBTITLES)
    rationale = rng.choice(FRAMES).format(kind=kind, cue=cue, stand=rng.choice(emotion.stands))
    return {
        "prompt": f'Face: {clip.face}\nVoice: {clip.voice}\nWords: "{words}"\n{QUESTION}',
        "rationale": rationale[0].upper() + rationale[1:],
        "label": clip.label,
        "answer": f"<think>{emotion.thought}</think><answer>{clip.label}</answer>",
    }


def write(folder: Path) -> None:
    """Every file of rows; the same for everybody."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, clips in splits().items():
        rng = random.Random(f"{SEED} {name}")
        rows = [{"id": f"{name}-{i}", **row(name, clip, rng)} for i, clip in enumerate(clips)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(rows)} rows")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(f"usage: python {sys.argv[0]} FOLDER")
    write(Path(sys.argv[1]))
