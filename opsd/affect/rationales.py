"""What an observer writes about a clip: the cues that are really there, in several wordings, never the label."""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np

from opsd.affect.cues import Face, Voice

Table: TypeAlias = dict[str, tuple[str, ...]]

# cue word -> paraphrases. The cue words themselves are what the student is taught to write.
BROWS: Final[Table] = {
    "level": ("the brows are level", "the eyebrows rest flat", "an even brow"),
    "raised": ("the brows are raised", "the eyebrows go up", "a lifted brow"),
    "lowered": ("the brows are lowered", "the eyebrows push down", "a knitted brow"),
    "slanted": ("the brows are slanted", "the eyebrows tilt up inside", "a sloping brow"),
}
EYES: Final[Table] = {
    "soft": ("the eyes are soft", "a relaxed gaze", "the lids look at ease"),
    "wide": ("the eyes are wide", "a staring gaze", "the lids are pulled back"),
    "narrow": ("the eyes are narrow", "a squinting gaze", "the lids are tight"),
    "heavy": ("the eyes are heavy", "a drooped gaze", "the lids hang"),
}
MOUTH: Final[Table] = {
    "curved": ("the mouth is curved", "a smile", "the lips turn up"),
    "open": ("the mouth is open", "a dropped jaw", "the lips are parted"),
    "pressed": ("the mouth is pressed", "a thin line of a mouth", "the lips are shut hard"),
    "drooping": ("the mouth is drooping", "a frown", "the lips turn down"),
}
PITCH: Final[Table] = {
    "high": ("the voice is high", "a raised pitch", "it sits above the speaker's usual tone"),
    "low": ("the voice is low", "a deep pitch", "it sits below the speaker's usual tone"),
}
VOLUME: Final[Table] = {
    "loud": ("it is loud", "it comes with force", "a strong sound"),
    "quiet": ("it is quiet", "it is barely heard", "a faint sound"),
}
PACE: Final[Table] = {
    "bouncing": ("the pace is bouncing", "every syllable swings upward", "a springing rhythm"),
    "shaking": ("the pace is shaking", "it trembles throughout", "an unsteady rhythm"),
    "clipped": ("the pace is clipped", "the syllables are cut short", "a biting rhythm"),
    "dragging": ("the pace is dragging", "the syllables are drawn out", "a sluggish rhythm"),
}
TEAR: Final[tuple[str, ...]] = ("there is a tear", "one cheek is wet")
BLUSH: Final[tuple[str, ...]] = ("the cheeks are red", "there is a flush")
FRAMES: Final = (
    "On the face, {face}. In the sound, {voice}.",
    "Voice: {voice}. Face: {face}.",
    "One sees this: {face}. One hears this: {voice}.",
    "Listen first: {voice}. Then look: {face}.",
)


def write_rationale(face: Face, voice: Voice, rng: np.random.Generator) -> str:
    """A short text that names every cue of the clip once, in a random wording and order."""
    seen = [BROWS[face.brows], EYES[face.eyes], MOUTH[face.mouth]]
    seen += [TEAR] * face.tear + [BLUSH] * face.blush
    heard = [PITCH[voice.pitch], VOLUME[voice.volume], PACE[voice.pace]]

    def phrase(options: list[tuple[str, ...]]) -> str:
        order = rng.permutation(len(options))
        return ", ".join(options[i][rng.integers(len(options[i]))] for i in order)

    return FRAMES[rng.integers(len(FRAMES))].format(face=phrase(seen), voice=phrase(heard))


def every_phrase() -> list[str]:
    """All texts a rationale is made of."""
    tables = (BROWS, EYES, MOUTH, PITCH, VOLUME, PACE)
    return [*FRAMES, *TEAR, *BLUSH, *(phrase for table in tables for options in table.values() for phrase in options)]


def read_rationale(text: str) -> tuple[Face, Voice]:
    """The cues a rationale names; the inverse of `write_rationale`. ValueError if a cue is missing or named twice."""

    def find(table: Table) -> str:
        hits = [word for word, phrases in table.items() if any(p in text for p in phrases)]
        if len(hits) != 1:
            raise ValueError(f"expected one of {sorted(table)} in the rationale, found {hits}: {text!r}")
        return hits[0]

    face = Face(find(BROWS), find(EYES), find(MOUTH), any(p in text for p in TEAR), any(p in text for p in BLUSH))
    return face, Voice(find(PITCH), find(VOLUME), find(PACE))


def write_answer(face: Face, voice: Voice, label: str) -> str:
    """The gold response: the cues in a fixed wording, then the label."""
    seen = f"brows {face.brows} , eyes {face.eyes} , mouth {face.mouth}"
    heard = f"voice {voice.pitch} , {voice.volume} , {voice.pace}"
    return f"<think> {seen} ; {heard} </think> <answer> {label} </answer>"
