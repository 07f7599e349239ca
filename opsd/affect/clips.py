"""The procedural affect set: rows (JSONL) and their videos with sound, written as a user's own data would be."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from opsd.affect.cues import FACES, LABELS, PAIRS, VOICES, Face, Voice
from opsd.affect.faces import FaceRange, film
from opsd.affect.rationales import every_phrase, write_answer, write_rationale
from opsd.affect.video_files import write_clip
from opsd.affect.voices import RATE, VoiceRange, speak

# Said with any emotion: the label is independent of the subtitle, so the text alone is at chance.
SUBTITLES: Final = (
    "I did not expect this.",
    "So that is how it is.",
    "Well, here we are.",
    "You should have told me.",
    "I saw it this morning.",
    "That is just great.",
    "They are all here now.",
    "It is fine, really.",
    "What a lovely day.",
    "I hate waiting.",
    "Nothing will change.",
    "Look at that.",
)
FRAMES: Final = 4
FRAME_RATE: Final = 5  # a second
QUESTION: Final = "Which emotion does this person feel? Name the cues, then answer."


@dataclass(frozen=True)
class Split:
    """Name, a number that separates its random stream from the others', and how far looks may vary."""

    name: str
    stream: int
    face: FaceRange
    voice: VoiceRange


TEST_FACE: Final = FaceRange(
    skin=(0.25, 0.95), radius=(0.34, 0.43), offset=0.05, tilt=8.0, background=(0.2, 0.9), line=(0.03, 0.052), noise=0.03
)
TEST_VOICE: Final = VoiceRange(
    speaker=(132.0, 182.0), seconds=(0.72, 0.88), formants=(0.93, 1.1), tempo=0.1, noise=(0.001, 0.006)
)
TRAIN: Final = Split("train", 1, FaceRange(), VoiceRange())
VALIDATION: Final = Split("validation", 2, FaceRange(), VoiceRange())
TEST: Final = Split("test", 3, TEST_FACE, TEST_VOICE)


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn and spoken."""

    id: str
    face_name: str
    voice_name: str
    face: Face
    voice: Voice
    label: str
    subtitle: str
    rationale: str


def make_clip(split: Split, seed: int, index: int) -> tuple[Clip, np.random.Generator]:
    """Clip `index` of a split, and the generator that goes on to draw it: independent of every other clip."""
    rng = np.random.default_rng([seed, split.stream, index])
    label = LABELS[index % len(LABELS)]
    pairs = PAIRS[label]
    face_name, voice_name, _ = pairs[rng.choice(len(pairs), p=[share for _, _, share in pairs])]
    tear, blush = rng.random(2) < 0.25
    face = FACES[face_name]._replace(tear=bool(tear), blush=bool(blush))
    voice = VOICES[voice_name]
    subtitle = SUBTITLES[rng.integers(len(SUBTITLES))]
    rationale = write_rationale(face, voice, rng)
    clip = Clip(f"{split.name}-{seed}-{index:05d}", face_name, voice_name, face, voice, label, subtitle, rationale)
    return clip, rng


def to_row(clip: Clip) -> dict[str, Any]:
    """The JSONL row of a clip; media paths are relative to the JSONL file."""
    content = [
        {"type": "video", "video": f"clips/{clip.id}.avi"},
        {"type": "audio", "audio": f"clips/{clip.id}.avi"},
        {"type": "text", "text": QUESTION},
    ]
    return {
        "id": clip.id,
        "prompt": [{"role": "user", "content": content}],
        "rationale": clip.rationale,
        "label": clip.label,
        "answer": write_answer(clip.face, clip.voice, clip.label),
        "subtitle": clip.subtitle,
    }


def every_text() -> list[str]:
    """Texts that hold every word a row can hold."""
    answers = [
        write_answer(face, voice, label) for face in FACES.values() for voice in VOICES.values() for label in LABELS
    ]
    return [QUESTION, *SUBTITLES, *every_phrase(), *answers]


def write_split(folder: Path, split: Split, seed: int, size: int) -> Path:
    """Write `size` clips under `folder`; returns the JSONL file. The same arguments give the same bytes."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    lines = []
    for index in range(size):
        clip, rng = make_clip(split, seed, index)
        pictures, sound = film(clip.face, split.face, FRAMES, rng), speak(clip.voice, split.voice, rng)
        write_clip(folder / "clips" / f"{clip.id}.avi", pictures, FRAME_RATE, sound, RATE)
        lines.append(json.dumps(to_row(clip)) + "\n")
    path = folder / f"{split.name}.jsonl"
    path.write_text("".join(lines), encoding="utf-8")
    return path
