"""Tokens as text that a person can read: what each adds to an answer, and what it is on its own."""

from __future__ import annotations

from typing import Any

PARTIAL = "\ufffd"  # what a tokenizer decodes bytes to that are not yet, or never will be, a character
_VISIBLE = {" ": "␣", "\n": "⏎", "\t": "⇥"}


def pieces(tokenizer: Any, ids: list[int]) -> list[str]:
    """What each token adds to the text of those before it, special tokens by their names.

    A character of several tokens belongs to the last of them; the others add nothing. Joined, the pieces are the text.
    """
    found, shown = [], ""
    for count in range(1, len(ids) + 1):
        text = _text(tokenizer, ids[:count])
        unfinished = text.endswith(PARTIAL) and count < len(ids)
        found.append("" if unfinished else text[len(shown) :])
        shown = shown if unfinished else text
    return found


def name(tokenizer: Any, token: int) -> str:
    """A token on its own: its text with white space made visible, or how the vocabulary writes it, or its number."""
    text = _text(tokenizer, [token])
    if not text or PARTIAL in text:
        text = tokenizer.convert_ids_to_tokens(token) or f"#{token}"
    return "".join(_VISIBLE.get(char, char if char.isprintable() else PARTIAL) for char in text)


def _text(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
