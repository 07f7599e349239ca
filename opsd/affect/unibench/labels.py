"""A list of labels as text, read the way the benchmark's script reads it."""

from __future__ import annotations

import re
from typing import Any


def parse_labels(value: Any) -> list[str]:
    """Labels in lower case, without outer space, in order, repeats kept.

    A list passes as it is. Nothing, "" and NaN are no labels. From text one leading "[" and one trailing "]" are cut,
    then it is split at every `'`, `"` and `,`; empty pieces are dropped. The cut comes before the strip, so
    " [happy]" gives "[happy", which no wheel knows; the elements of a list are not split again.
    """
    return [item.lower().strip() for item in split_labels(value)]


def split_labels(value: Any) -> list[str]:
    """The same with capitals kept, and the elements of a list untouched."""
    if hasattr(value, "tolist"):  # a numpy array or scalar
        value = value.tolist()
    if isinstance(value, list | tuple):
        return [str(item) for item in value]
    if value is None or value == "" or value != value:  # NaN differs from itself
        return []
    text = str(value)
    text = text[1:] if text[0] == "[" else text
    text = text[:-1] if text.endswith("]") else text
    return [item.strip() for item in re.split("['\",]", text) if item.strip()]


def parse_sentiment(value: Any) -> int:
    """+1 for the exact text "positive", -1 for "negative", 0 for everything else ("Positive" too)."""
    return {"positive": 1, "negative": -1}.get(value, 0) if isinstance(value, str) else 0
