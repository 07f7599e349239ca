"""What an answer is worth: is the label right, is the format right.

Format (OmniOPSD, arXiv 2606.15920): `<think>...</think><answer>...</answer>`.
"""

from __future__ import annotations

import re

from opsd.config import RewardsConfig
from opsd.data import Example

_THINK = re.compile(r"<think>(.*?)</think>", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


def parse_answer(text: str) -> str | None:
    """The first non-empty answer block, stripped and lower-cased; None without one."""
    return next((body.strip().lower() for body in _ANSWER.findall(text) if body.strip()), None)


def accuracy(text: str, label: str | None) -> float:
    """1 when the answer block is the label (case and outer space ignored), else 0; 0 without a label."""
    return float(label is not None and parse_answer(text) == label.strip().lower())


def well_formed(text: str) -> float:
    """1 when the first non-empty think block precedes the first non-empty answer block, else 0."""
    think = next((m.start() for m in _THINK.finditer(text) if m.group(1).strip()), None)
    answer = next((m.start() for m in _ANSWER.finditer(text) if m.group(1).strip()), None)
    return float(think is not None and answer is not None and think < answer)


def reward(text: str, example: Example, config: RewardsConfig) -> float:
    """R(y) = w_accuracy * accuracy + w_format * format."""
    return config.accuracy * accuracy(text, example.label) + config.format * well_formed(text)
