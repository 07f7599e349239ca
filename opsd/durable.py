"""Files that are whole or not there, whatever ends the process or the machine.

A name is given to bytes only once they are on the disk, and the naming itself is on the disk when a call returns.
"""

from __future__ import annotations

import os
from pathlib import Path

from opsd.errors import writing


def sync(path: Path) -> None:
    """Return when what a file holds, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_text(path: Path, text: str) -> None:
    """The file with this text, or the one before it. Raises OSError that names the file."""
    temporary = beside(path)
    with writing(path):
        try:
            temporary.write_text(text, encoding="utf-8")
            sync(temporary)
            rename(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)  # a disk that is full gets its room back
            raise


def rename(old: Path, new: Path) -> None:
    """Name a file or folder, over a file of that name, for good."""
    os.replace(old, new)
    sync(new.parent)


def beside(path: Path) -> Path:
    """Where `path` is written before it has its name: hidden, in the same folder."""
    return path.with_name(f".{path.name}.tmp")
