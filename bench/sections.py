"""Sections of a report, run so that none of them can take the others down.

A parent that touches no device starts a child; the child runs sections in order and writes NAME.json after every row.
A section that raises leaves its traceback in the file. One that kills the child (a fault, memory) or outlives its time
by GRACE is noted by the parent, and a new child goes on with the next section; so does one that leaves the device in
an error from which only a new process recovers.
"""

import json
import os
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GRACE = 45.0  # seconds beyond its own that a section may need for a step under way, compilation included
RESTART = 3  # exit code of a child whose device is of no use any more


@dataclass(frozen=True)
class Budget:
    """Seconds that a section still has."""

    deadline: float
    clock: Callable[[], float]

    @property
    def left(self) -> float:
        return self.deadline - self.clock()


@dataclass(frozen=True)
class Section:
    name: str
    seconds: float
    rows: Callable[[Budget], Iterator[Row]]  # yields what it found; a row with "ok": False fails the report


def read(path: Path) -> Row:
    loaded: Row = json.loads(path.read_text(encoding="utf-8"))
    return loaded


def save(path: Path, contents: Row) -> None:
    """Whole or not at all: the process may die at any moment."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    os.replace(part, path)


def run(
    sections: list[Section],
    path: Path,
    healthy: Callable[[], bool],
    say: Callable[[Row], None],
    clock: Callable[[], float] = time.time,
) -> int:
    """The child: every section that the file does not know yet, until the file's deadline. Returns an exit code."""
    contents = read(path)
    for section in sections:
        if section.name in contents["sections"]:
            continue
        start = clock()
        found: Row = {"rows": [], "error": None, "started": start, "seconds": None}
        contents["sections"][section.name] = found
        left = contents["deadline"] - start
        if left < 3:
            found["error"] = "no time left"
            save(path, contents)
            continue
        save(path, contents)
        say({"section": section.name, "seconds": round(min(section.seconds, left))})
        try:
            for row in section.rows(Budget(start + min(section.seconds, left), clock)):
                found["rows"].append(row)
                say(row)
                save(path, contents)
        except Exception:  # whatever it was, the others are worth having
            found["error"] = traceback.format_exc()
            say({"section": section.name, "error": found["error"]})
        found["seconds"] = clock() - start
        save(path, contents)
        if not healthy():
            return RESTART
    return 0


def supervise(
    sections: list[Section],
    path: Path,
    start: Callable[[], "subprocess.Popen[Any]"],
    clock: Callable[[], float] = time.time,
    pause: Callable[[float], None] = time.sleep,
) -> None:
    """The parent: children one after the other until every section has had its turn."""
    seconds = {section.name: section.seconds for section in sections}
    for _ in range(len(sections) + 1):  # each child finishes one section at least
        child, running, since = start(), None, clock()
        while child.poll() is None:
            pause(0.2)
            now = _unfinished(path)
            if now != running:
                running, since = now, clock()
            if clock() - since > GRACE + (seconds[running] if running else GRACE):  # without a section: it imports
                child.kill()
                child.wait()
        contents = read(path)
        unfinished = _unfinished(path)
        if unfinished is not None:
            found = contents["sections"][unfinished]
            found["seconds"] = clock() - found["started"]
            found["error"] = f"its process ended with {child.returncode}"
            save(path, contents)
        if set(seconds) <= set(contents["sections"]):
            return
        if unfinished is None and child.returncode not in (0, RESTART):
            contents["error"] = f"a process ended with {child.returncode} before it began a section"
            save(path, contents)
            return


def _unfinished(path: Path) -> str | None:
    for name, found in read(path)["sections"].items():
        if found["seconds"] is None and found["error"] is None:
            return str(name)
    return None


def failures(contents: Row) -> list[str]:
    """Sections that did not come to their end, and rows that are not what they should be."""
    lines = [contents["error"]] if contents.get("error") else []
    for name, found in contents["sections"].items():
        if found["error"]:
            lines.append(f"{name}: {found['error'].strip().splitlines()[-1][:300]}")
        lines += [f"{name}: {row}" for row in found["rows"] if row.get("ok") is False]
    return lines
