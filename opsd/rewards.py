"""What an answer is worth: is the label right, is the format right.

Format (OmniOPSD, arXiv 2606.15920): `<think>...</think><answer>...</answer>`. Texts are not XML: a tag is exactly these
characters, wherever they stand, and a block goes from its first opening tag to the next closing one, so that blocks do
not nest. Every text costs time linear in its length.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator

from opsd.config import RewardsConfig
from opsd.data import Example


def parse_answer(text: str) -> str | None:
    """The first non-empty answer block, stripped and lower-cased; None without one."""
    return next((body.lower() for _, body, _ in _blocks(text, "answer")), None)


def accuracy(text: str, label: str | None) -> float:
    """1 when the answer block is the label (case and outer space ignored), else 0; 0 without a label.

    Characters that only look alike differ; encodings of the same ones (Unicode's NFC and NFD) do not.
    """
    answer = parse_answer(text)
    return float(label is not None and answer is not None and _canonical(answer) == _canonical(label.strip().lower()))


def well_formed(text: str) -> float:
    """1 when the first non-empty think block ends before the first non-empty answer block begins, else 0."""
    think, answer = next(_blocks(text, "think"), None), next(_blocks(text, "answer"), None)
    return float(think is not None and answer is not None and think[2] <= answer[0])


def reward(text: str, example: Example, config: RewardsConfig) -> float:
    """R(y) = w_accuracy * accuracy + w_format * format."""
    return config.accuracy * accuracy(text, example.label) + config.format * well_formed(text)


def _blocks(text: str, name: str) -> Iterator[tuple[int, str, int]]:
    """(start, stripped body, end) of every non-empty <name>body</name>, from left to right."""
    opening, closing = f"<{name}>", f"</{name}>"
    at = 0
    while (start := text.find(opening, at)) >= 0:
        stop = text.find(closing, start + len(opening))
        if stop < 0:
            return
        at = stop + len(closing)
        if body := text[start + len(opening) : stop].strip():
            yield start, body, at


def _canonical(text: str) -> str:
    return unicodedata.normalize("NFC", text)
