"""How long the prompts of a run are: of the rows with the most text and media, rendered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from opsd.data import Example
from opsd.plan.workload import Longest
from opsd.prompts import Prompt

_RENDERED = 16  # rows with the most to read
_MEDIUM = 4000  # characters that a medium counts for when rows are compared
_CHARACTERS = 3  # per token of text, fewer than most tokenizers put into one


class Views(Protocol):
    """The two views of a row: a `PromptBuilder`, or a cache of one."""

    def student(self, example: Example) -> Prompt: ...

    def teacher(self, example: Example) -> Prompt: ...


def longest_of(rows: Sequence[Example], views: Views, teaches: bool) -> Longest:
    """The first row and those with the most text and media, rendered in both views (one where nobody teaches)."""
    chosen = [rows[0], *sorted(rows, key=weight, reverse=True)[:_RENDERED]]
    prompts = [views.student(row) for row in chosen]
    seen = [views.teacher(row) for row in chosen] if teaches else prompts
    kept = [sum(x.nbytes for x in prompt.inputs.values()) for prompt in (*prompts, *(seen if teaches else ()))]
    return Longest(
        max(prompt.length for prompt in prompts),
        max(view.length for view in seen),
        len(rows),
        prompt_bytes=sum(kept) // len(chosen),
        has_media=any(True for row in rows for _ in row.media()),
    )


def roughly(rows: Sequence[Example]) -> Longest:
    """Counted in characters, for a folder without a tokenizer: text alone, media not at all."""
    student = max(sum(map(len, _texts(row))) for row in rows)
    teacher = max(sum(map(len, _texts(row))) + len(row.rationale or "") for row in rows)
    return Longest(1 + student // _CHARACTERS, 1 + teacher // _CHARACTERS, len(rows))


def weight(row: Example) -> int:
    """Something that grows with the length of the row's prompts: characters, and many for a medium."""
    return sum(map(len, _texts(row))) + len(row.rationale or "") + _MEDIUM * len(list(row.media()))


def _texts(row: Example) -> list[str]:
    parts = [part for message in row.messages for part in message["content"]]
    return [*(part.get("text", "") for part in parts), row.subtitle or ""]
