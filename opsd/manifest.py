"""What a folder holds, file by file with size and SHA-256, in a file of the folder: damage is found before it is read.

    FOLDER/manifest.json    {"files": {"model.safetensors": {"bytes": 548, "sha256": "9f86..."}, ...}}

A flipped bit in the manifest itself is found too: whatever it says then is not what is there.
"""

from __future__ import annotations

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from opsd.durable import sync

NAME = "manifest.json"
_THREADS = 4  # hashing lets go of the interpreter
_BLOCK = 1 << 20  # bytes read at a time


def seal(folder: Path) -> None:
    """Describe every file of a folder that is complete. Returns when all of it is on the disk."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != NAME]
    with ThreadPoolExecutor(_THREADS) as pool:
        entries = pool.map(_sealed, files)
        said = {path.relative_to(folder).as_posix(): entry for path, entry in zip(files, entries, strict=True)}
    manifest = folder / NAME
    manifest.write_text(json.dumps({"files": said}, indent=1), encoding="utf-8")
    for path in (manifest, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        sync(path)


def damage(folder: Path) -> str | None:
    """The first thing about a sealed folder that is not as it was, in words; None for one that is intact.

    Sizes are compared first, so that what was cut short is told at once. Files that were added do not matter.
    """
    try:
        said = json.loads((folder / NAME).read_text(encoding="utf-8"))["files"]
        files = {folder / name: (entry["bytes"], entry["sha256"]) for name, entry in said.items()}
    except FileNotFoundError:
        return f"no {NAME}"
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return f"{NAME} cannot be read"
    try:
        for path, (size, _) in files.items():
            if path.stat().st_size != size:
                return f"{path.name} has {path.stat().st_size} bytes, not {size}"
        with ThreadPoolExecutor(_THREADS) as pool:
            for (path, (_, digest)), found in zip(files.items(), pool.map(_digest, files), strict=True):
                if found != digest:
                    return f"{path.name} is not what was written (SHA-256)"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except (OSError, ValueError) as error:  # ValueError: a name that no file can have
        return f"cannot be read: {error}"
    return None


def identity(folder: Path) -> str:
    """A name for what a sealed folder holds: two that differ in a byte have different ones."""
    return _digest(folder / NAME)


def _sealed(path: Path) -> dict[str, Any]:
    sync(path)
    return {"bytes": path.stat().st_size, "sha256": _digest(path)}


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
