"""Work on thousands of clips that survives being stopped: what is done is kept in a file beside the result.

One JSON object a line: first what the work is, then {"clip": ..., "text": ...}. A file of other work is started over,
and a line that a kill cut short is done again.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final, TypeVar

from opsd.errors import writing

T = TypeVar("T")
CHUNK: Final = 64


def work_through(
    path: Path, what: str, todo: Mapping[str, T], work: Callable[[dict[str, T]], dict[str, str]]
) -> dict[str, str]:
    """`work` of every clip of `todo`, a chunk at a time, in the order of `todo`.

    path: the result's; the journal is PATH.partial, and gone at the end. what: identifies the work with its settings.
    """
    journal = path.with_name(f"{path.name}.partial")
    done = _read(journal, what)
    left = [name for name in todo if name not in done]
    with writing(journal):
        journal.parent.mkdir(parents=True, exist_ok=True)
        with journal.open("w", encoding="utf-8") as file:
            file.write(json.dumps({"what": what}) + "\n")
            file.writelines(_line(name, text) for name, text in done.items())
            file.flush()
            for first in range(0, len(left), CHUNK):
                made = work({name: todo[name] for name in left[first : first + CHUNK]})
                file.writelines(_line(name, text) for name, text in made.items())
                file.flush()
                done |= made
    journal.unlink()
    return {name: done[name] for name in todo}


def _line(name: str, text: str) -> str:
    return json.dumps({"clip": name, "text": text}, ensure_ascii=False) + "\n"


def _read(journal: Path, what: str) -> dict[str, str]:
    if not journal.is_file():
        return {}
    # not splitlines: responses may hold characters that also end a line in Unicode; what follows the last "\n" is cut
    first, *lines = journal.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] or [""]
    if first != json.dumps({"what": what}):
        return {}
    entries = [json.loads(line) for line in lines]
    return {entry["clip"]: entry["text"] for entry in entries}
