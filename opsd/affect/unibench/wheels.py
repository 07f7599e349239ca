"""Emotion wheels: the group a word falls into, under each of five wheels.

A folder as the benchmark publishes it (its licence is for research, so it is read from the user's copy):

    wheel1.xlsx ... wheel5.xlsx   columns level1, level2, level3; a blank cell repeats the one above it
    synonym.xlsx                  word_run1 ... word_run8, synonym_run1 ... synonym_run8: wheel words, their synonyms
    format.csv                    name, format: base words, their other forms

A word's way, as in the official `func_backward_case3`: surface form -> base words (format.csv) -> wheel words
(synonym.xlsx, the union of eight runs); of those, the first in alphabetical order that this wheel has -> its level-1
group. What is not found anywhere on the way has no group.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from opsd.affect.unibench.labels import parse_labels, split_labels
from opsd.affect.unibench.tables import Row, read_table
from opsd.errors import InputError, raise_all

WHEELS: Final = 5
RUNS: Final = 8


@dataclass(frozen=True)
class Wheels:
    """`routes`: surface form -> wheel words in alphabetical order. `groups`: per wheel, wheel word -> level-1 word."""

    routes: dict[str, tuple[str, ...]]
    groups: tuple[dict[str, str], ...]

    @cached_property
    def _of_surface(self) -> dict[str, tuple[str | None, ...]]:
        return {
            surface: tuple(next((wheel[word] for word in words if word in wheel), None) for wheel in self.groups)
            for surface, words in self.routes.items()
        }

    def of(self, word: str) -> tuple[str | None, ...]:
        """The group of a word under each wheel; None where it has none. The word is looked up as it is."""
        return self._of_surface.get(word, (None,) * len(self.groups))

    def map(self, words: Iterable[str]) -> tuple[frozenset[str], ...]:
        """The groups of a list of words under each wheel; words without one are dropped."""
        found = [self.of(word) for word in words]
        return tuple(frozenset(groups[w] for groups in found if groups[w]) for w in range(len(self.groups)))  # type: ignore[misc]


def load_wheels(folder: Path) -> Wheels:
    """Read a folder of tables. Raises `InputError` naming file, row and column; missing files come in one message."""
    names = [*(f"wheel{n}.xlsx" for n in range(1, WHEELS + 1)), "synonym.xlsx", "format.csv"]
    raise_all([InputError("an existing file", "no file", file=folder / n) for n in names if not (folder / n).is_file()])
    groups = tuple(_read_wheel(folder / f"wheel{n}.xlsx") for n in range(1, WHEELS + 1))
    synonyms = _read_synonyms(folder / "synonym.xlsx", {word for wheel in groups for word in wheel})
    bases = _read_formats(folder / "format.csv")
    routes = {
        surface: tuple(sorted({word for base in found for word in synonyms.get(base, ())}))
        for surface, found in bases.items()
    }
    return Wheels(routes, groups)


def _read_wheel(path: Path) -> dict[str, str]:
    """Wheel word -> level-1 word. A word of several branches takes the last one written, branches being ordered by
    where they first appear: level 1, in it level 2, in it level 3."""
    tree: dict[str, dict[str, list[str]]] = {}
    above = {"level1": "", "level2": "", "level3": ""}
    for row in read_table(path, tuple(above)):
        above = {level: row[level].lower().strip() or word for level, word in above.items()}
        if not above["level1"]:
            raise row.problem("level1", "a word in the first row", "an empty cell")
        tree.setdefault(above["level1"], {}).setdefault(above["level2"], []).append(above["level3"])
    if not tree:
        raise InputError("at least one row", "an empty wheel", file=path)
    groups = {}
    for level1, branches in tree.items():
        groups[level1] = level1
        for level2, leaves in branches.items():
            groups |= dict.fromkeys((level2, *leaves), level1)
    return groups


def _read_synonyms(path: Path, wheel_words: set[str]) -> dict[str, set[str]]:
    """Base word -> wheel words: every wheel word is its own base, and every synonym of it is one."""
    columns = [(f"word_run{n}", f"synonym_run{n}") for n in range(1, RUNS + 1)]
    found: dict[str, set[str]] = {}
    for row in read_table(path, tuple(name for pair in columns for name in pair)):
        for word_column, synonym_column in columns:
            word = _wheel_word(row, word_column, wheel_words)
            for base in (word, *parse_labels(row[synonym_column])):
                found.setdefault(base, set()).add(word)
    return found


def _wheel_word(row: Row, column: str, wheel_words: set[str]) -> str:
    word = row.text(column).lower()
    if word not in wheel_words:
        raise row.problem(column, "a word of one of the wheels", repr(word))
    return word


def _read_formats(path: Path) -> dict[str, set[str]]:
    """Surface form -> base words. A base word is its own surface form. Capitals are kept, as in the official script, so
    a form that has one is never found."""
    found: dict[str, set[str]] = {}
    for row in read_table(path, ("name", "format")):
        for surface in (row["name"], *split_labels(row["format"])):
            found.setdefault(surface, set()).add(row["name"])
    return found
