"""The six labels, the cues a clip can carry, and the rule that joins them.

A clip has one of four faces and one of four voices. Neither tells the label alone:

    lively voice     surprised if the face is startled, otherwise happy
    trembling voice  sad if the face is downcast, otherwise afraid
    harsh voice      surprised if the face is startled, disgusted if it is downcast, otherwise angry
    dull voice       disgusted if the face is tense, otherwise sad

So a smile is never trusted by itself: over a trembling voice it masks fear, over a harsh one anger, over a dull one
sadness.
"""

from __future__ import annotations

from typing import Final, NamedTuple

LABELS: Final = ("happy", "sad", "angry", "afraid", "surprised", "disgusted")


class Face(NamedTuple):
    """The cue words of a drawn face; `tear` and `blush` are extras that do not bear on the label."""

    brows: str
    eyes: str
    mouth: str
    tear: bool = False
    blush: bool = False


class Voice(NamedTuple):
    """The cue words of a voice clip."""

    pitch: str
    volume: str
    pace: str


FACES: Final = {
    "smiling": Face("level", "soft", "curved"),
    "startled": Face("raised", "wide", "open"),
    "tense": Face("lowered", "narrow", "pressed"),
    "downcast": Face("slanted", "heavy", "drooping"),
}
VOICES: Final = {
    "lively": Voice("high", "loud", "bouncing"),
    "trembling": Voice("high", "quiet", "shaking"),
    "harsh": Voice("low", "loud", "clipped"),
    "dull": Voice("low", "quiet", "dragging"),
}

# label -> (face, voice, share of the label's clips); "agree" pairs first.
PAIRS: Final[dict[str, tuple[tuple[str, str, float], ...]]] = {
    "happy": (("smiling", "lively", 0.65), ("downcast", "lively", 0.35)),
    "sad": (("downcast", "dull", 0.4), ("downcast", "trembling", 0.3), ("smiling", "dull", 0.3)),
    "angry": (("tense", "harsh", 0.65), ("smiling", "harsh", 0.35)),
    "afraid": (("startled", "trembling", 0.65), ("smiling", "trembling", 0.35)),
    "surprised": (("startled", "lively", 0.7), ("startled", "harsh", 0.3)),
    "disgusted": (("tense", "dull", 0.5), ("downcast", "harsh", 0.5)),
}


def label_of(face: str, voice: str) -> str:
    """The rule above: the label that a face and a voice give together."""
    if voice == "lively":
        return "surprised" if face == "startled" else "happy"
    if voice == "trembling":
        return "sad" if face == "downcast" else "afraid"
    if voice == "harsh":
        return {"startled": "surprised", "downcast": "disgusted"}.get(face, "angry")
    if voice == "dull":
        return "disgusted" if face == "tense" else "sad"
    raise ValueError(f"expected a voice in {sorted(VOICES)}, got {voice!r}")
