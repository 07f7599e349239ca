"""Where runs lie that were given no folder: `runs/<name>-001`, `runs/<name>-002`, ..."""

from __future__ import annotations

import re
from pathlib import Path

from opsd.config import Config


def run_dirs(name: str, root: Path = Path("runs")) -> list[Path]:
    """Every `runs/<name>-NNN` there is, in the order of their numbers."""
    named = [(int(m[1]), p) for p in root.glob("*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
    return [path.absolute() for _, path in sorted(named)]


def next_run_dir(name: str, root: Path = Path("runs")) -> Path:
    """The first free `runs/<name>-NNN`."""
    last = next((int(path.name.rpartition("-")[2]) for path in reversed(run_dirs(name, root))), 0)
    return (root / f"{name}-{last + 1:03d}").absolute()


def with_run_dir(config: Config, path: Path) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"run_dir": path})})
