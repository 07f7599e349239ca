"""The checkpoints a run has: which one is the newest that is intact, which is the best, which are kept.

    RUN/checkpoints/step-000100    `opsd.checkpoint` writes and reads one
    RUN/checkpoints/last           link to the newest
    RUN/checkpoints/best           link to the best by `checkpoint.best`

Names begin with a dot while they are not whole, or not any more: a kill leaves them, `tidy` removes them.
"""

from __future__ import annotations

import logging
import re
import shutil
from contextlib import suppress
from pathlib import Path

from opsd import manifest
from opsd.checkpoint import Checkpoint, read_meta
from opsd.config import CheckpointConfig
from opsd.durable import beside, rename
from opsd.errors import InputError

_HALF_DONE = (".step-*", ".last.tmp", ".best.tmp")

log = logging.getLogger(__name__)


class Shelf:
    def __init__(self, folder: Path):
        self.folder = folder

    def path(self, step: int) -> Path:
        return self.folder / f"step-{step:06d}"

    def checkpoint(self, step: int) -> Checkpoint:
        """As it stands there, not verified."""
        return Checkpoint(self.path(step), read_meta(self.path(step)))

    def steps(self) -> list[int]:
        """Those there are, in order, intact or not."""
        names = [path.name for path in self.folder.glob("step-*")]
        return sorted(int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name))

    def newest(self) -> Checkpoint | None:
        """The intact checkpoint with the most steps, every byte verified; None where there is none at all.

        Why others were passed over is logged. Raises InputError where there are some, and none is intact.
        """
        reasons: dict[int, str] = {}
        for step in reversed(self.steps()):
            reason = self._obstacle(step)
            if reason is None:
                for other, why in reasons.items():
                    log.warning("%s passed over: %s", self.path(other), why)
                with suppress(OSError):  # a run that is only read may be read-only
                    _point(self.folder / "last", self.path(step))
                return self.checkpoint(step)
            reasons[step] = reason
        if reasons:
            found = "; ".join(f"step {step}: {why}" for step, why in reasons.items())
            hint = "without them the run starts over"
            raise InputError("an intact checkpoint", found, file=self.folder, hint=hint)
        return None

    def best(self, by: str) -> Checkpoint | None:
        """The checkpoint with the highest accuracy or the lowest loss, the first of equals."""
        sign = -1.0 if by == "loss" else 1.0
        scored: list[tuple[float, int, Checkpoint]] = []
        for step in self.steps():
            with suppress(InputError):
                found = self.checkpoint(step)
                if found.meta.scored == by and found.meta.score is not None:
                    scored.append((sign * found.meta.score, -step, found))
        return max(scored, key=lambda entry: entry[:2])[2] if scored else None

    def would_be_best(self, by: str, score: float) -> bool:
        best = self.best(by)
        return (
            best is None
            or best.meta.score is None
            or (score < best.meta.score if by == "loss" else score > best.meta.score)
        )

    def tidy(self, config: CheckpointConfig) -> None:
        """Point the links, drop all but the newest `keep` and the best, and what a killed run left half done."""
        for left in [path for pattern in _HALF_DONE for path in self.folder.glob(pattern)]:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()
        steps = self.steps()
        if not steps:
            return
        kept = set(steps[-config.keep :])
        _point(self.folder / "last", self.path(steps[-1]))
        best = self.best(config.best) if config.best != "none" else None
        if best is not None:
            kept.add(best.step)
            _point(self.folder / "best", best.path)
        else:
            (self.folder / "best").unlink(missing_ok=True)
        for step in steps:
            if step not in kept:
                self._drop(self.path(step))

    def set_aside(self, after: int) -> None:
        """Checkpoints of more than `after` steps, all passed over, stay for whoever wants to look, and out of the way:
        the run will write its own."""
        for step in self.steps():
            if step > after:
                aside = self.folder / f"damaged-{self.path(step).name}"
                shutil.rmtree(aside, ignore_errors=True)
                rename(self.path(step), aside)
                log.warning("kept as %s; remove it when you like", aside)

    def _obstacle(self, step: int) -> str | None:
        """Why the checkpoint cannot be taken, or None."""
        path = self.path(step)
        found = manifest.damage(path)
        if found is not None:
            return found
        try:
            said = read_meta(path).step
        except InputError as error:
            return f"trainer.json: expected {error.expected}; found {error.found}"
        return None if said == step else f"trainer.json is of step {said}"

    def _drop(self, path: Path) -> None:
        doomed = path.with_name(f".{path.name}.old")  # out of sight first: a kill half-way leaves no half checkpoint
        rename(path, doomed)
        shutil.rmtree(doomed)


def _point(link: Path, target: Path) -> None:
    if link.is_symlink() and link.readlink() == Path(target.name):
        return
    temporary = beside(link)
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    if link.is_dir() and not link.is_symlink():  # a copy of the run that followed links
        shutil.rmtree(link)
    rename(temporary, link)
