"""The rows of a JSONL file, all checked before the first step, and the order they are used in."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from pathlib import Path

from opsd.config import DataConfig
from opsd.errors import InputError, raise_all
from opsd.rows import Example, RowParser

__all__ = ["Example", "digest", "labelled", "order", "read_examples"]

_ENOUGH = 100  # problems after which reading stops: a message shows the first ten


def read_examples(path: Path, config: DataConfig, *, held_out: bool = False) -> list[Example]:
    """All rows of a JSONL file, in file order.

    held_out: rows for evaluation, which need no rationale. Raises `InputError` with file, line and field;
    several problems come in one message.
    """
    if path.suffix not in (".jsonl", ".json"):
        raise InputError("a .jsonl file", repr(path.name), file=path)
    examples: list[Example] = []
    problems: list[InputError] = []
    lines_of_ids: dict[str, int] = {}
    for line, raw in _lines(path):
        row = RowParser(path, line, config, need_rationale=config.require_rationale and not held_out)
        example = row.parse(raw)
        problems += row.problems
        if example is not None:
            if example.id in lines_of_ids:
                problems.append(
                    example.problem(
                        "id",
                        "an id of its own",
                        f"{example.id!r} again, first on line {lines_of_ids[example.id]}",
                    )
                )
            lines_of_ids.setdefault(example.id, line)
            examples.append(example)
        if len(problems) >= _ENOUGH:
            break
    raise_all(problems)
    if not examples:
        raise InputError("at least one row", "an empty dataset", file=path)
    return examples


def digest(examples: list[Example]) -> str:
    """SHA-256 of what the rows say, in their order; of media, where they lie."""
    content = hashlib.sha256()
    for example in examples:
        content.update(repr(replace(example, file=Path(), line=0)).encode("utf-8", "surrogatepass"))
    return content.hexdigest()


def labelled(rows: list[Example]) -> list[Example]:
    """The rows that accuracy can be measured on."""
    return [row for row in rows if row.label is not None]


def order(n_rows: int, rows_per_step: int, step: int, seed: int) -> list[int]:
    """The row indices of a step (counted from 0): a pure function, so a resumed run needs no state.

    Each epoch is its own permutation of all rows; a step may straddle two epochs.
    """
    if n_rows < 1 or rows_per_step < 1:
        raise ValueError(f"expected n_rows >= 1 and rows_per_step >= 1, got {n_rows} and {rows_per_step}")
    first = step * rows_per_step
    return [_permutation(n_rows, seed, at // n_rows)[at % n_rows] for at in range(first, first + rows_per_step)]


@lru_cache(maxsize=4)
def _permutation(n_rows: int, seed: int, epoch: int) -> tuple[int, ...]:
    # Python's generator seeded with text gives the same order on every platform and version.
    indices = list(range(n_rows))
    random.Random(f"opsd order {seed} {epoch}").shuffle(indices)
    return tuple(indices)


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """(line number, bytes) of lines that are not blank. Bytes, so that a bad line does not hide others."""
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise InputError("a readable JSONL file", error.strerror or str(error), file=path) from error
