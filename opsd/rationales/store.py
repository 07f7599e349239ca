"""The rows that have their rationale, in a file that survives being killed, and where each rationale came from.

OUT.jsonl             the input rows with their rationale, as they come; in the order of the input when all are there
OUT.provenance.jsonl  of every new rationale: id, model, template, media, why the reply ended, tokens, time

A line is written whole, its provenance first, so a kill costs at most the requests that were on their way.
"""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsd.config import at_home
from opsd.errors import InputError, writing


class Store:
    """OUT and the ids that are done in it. Shared by threads; nothing is written before `repair`.

    Raises `InputError` when OUT cannot be written or holds what is no row.
    """

    def __init__(self, out: Path) -> None:
        if out.suffix not in (".jsonl", ".json") or not out.parent.is_dir() or out.is_dir():
            raise InputError("a .jsonl file in an existing folder", str(out), field="--out")
        self.out, self.provenance = out, out.with_suffix(".provenance.jsonl")
        self.done = {str(row["id"]) for row in self.read()}
        self._lock = threading.Lock()

    def read(self) -> list[dict[str, Any]]:
        """The rows so far, without the half row that a kill may have left."""
        return _split(self.out)[0]

    def repair(self) -> None:
        """Cut a half record off the end of both files; a whole one without its line end gets it."""
        for path in (self.out, self.provenance):
            _, whole, rest = _split(path)
            if rest and whole:
                _append(path, b"\n")
            elif rest:
                with writing(path):
                    os.truncate(path, path.stat().st_size - len(rest))

    def add(self, row: dict[str, Any], provenance: dict[str, Any] | None) -> None:
        """Append a row; `provenance` is None for a rationale that the input already had."""
        with self._lock:
            if provenance is not None:
                _append(self.provenance, _line(provenance))
            _append(self.out, _line(row))
            self.done.add(str(row["id"]))

    def sort(self, ids: Sequence[str]) -> None:
        """Put the rows into the order of `ids`, which replaces the file in one go."""
        rows = {str(row["id"]): row for row in self.read()}
        temporary = self.out.with_suffix(".tmp")
        with writing(temporary):
            temporary.write_bytes(b"".join(_line(rows[name]) for name in ids if name in rows))
            os.replace(temporary, self.out)


def moved(row: dict[str, Any], here: Path, there: Path) -> dict[str, Any]:
    """A row of a file in folder `here` for one in folder `there`: relative paths of media name the same files."""
    if here.resolve() == there.resolve():
        return row

    def path(name: str) -> str:
        home = at_home(Path(name))
        return name if home.is_absolute() else os.path.relpath((here / home).absolute(), there.absolute())

    def part(given: dict[str, Any]) -> dict[str, Any]:
        return {k: path(v) if k == given["type"] and k != "text" else v for k, v in given.items()}

    row = dict(row)
    if isinstance(row["prompt"], list):
        row["prompt"] = [
            {**m, "content": [part(p) for p in m["content"]]} if isinstance(m["content"], list) else m
            for m in row["prompt"]
        ]
    if row.get("teacher_media"):
        row["teacher_media"] = [part(given) for given in row["teacher_media"]]
    if row.get("teacher_images"):
        row["teacher_images"] = [path(given) for given in row["teacher_images"]]
    return row


def _line(record: dict[str, Any]) -> bytes:
    return (json.dumps(record, ensure_ascii=False) + "\n").encode("utf-8")


def _append(path: Path, data: bytes) -> None:
    # one write of a whole line, in no buffer that a kill would lose
    with writing(path), path.open("ab", buffering=0) as file:
        file.write(data)


def _split(path: Path) -> tuple[list[dict[str, Any]], bool, bytes]:
    """The records of a file, whether what follows the last line end is one of them, and what that is."""
    if not path.exists():
        return [], True, b""
    *lines, rest = path.read_bytes().split(b"\n")
    records = [_record(line, path, number) for number, line in enumerate(lines, start=1) if line.strip()]
    try:
        return [*records, _record(rest, path, len(lines) + 1)], True, rest
    except InputError:
        return records, False, rest


def _record(line: bytes, path: Path, number: int) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise InputError("a JSON record", str(error), file=path, line=number) from error
    if not isinstance(record, dict) or "id" not in record:
        raise InputError("a record with an id", line[:80].decode("utf-8", "replace"), file=path, line=number)
    return record
