"""Which run is gone on with: its folder, locked against a second process, its config, its newest intact checkpoint."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from opsd.checkpoint import Checkpoint
from opsd.config import Config, load_config
from opsd.durable import beside
from opsd.errors import InputError, raise_all
from opsd.log import RunDir
from opsd.shelf import Shelf
from opsd.world import World

# What a resumed run may change: none of it moves a metric that is compared.
_FREE_TO_CHANGE = (
    *("log.", "checkpoint.", "train.threads", "train.parallel", "train.run_dir"),
    *("engine.teacher_cache_", "media.workers", "model.activation_checkpointing", "optim.in_backward"),
)

log = logging.getLogger(__name__)


def open_directory(config: Config, resume: bool, writes: bool) -> RunDir:
    """`train.run_dir`: a folder made for a new run, or that of a run of this config. writes: as of RunDir."""
    path = config.train.run_dir
    assert path is not None, "the command line resolves train.run_dir before a run is opened"
    if not resume:
        if writes:
            _make(path)
    else:
        file = saved_config(path)
        same_config(config, load_config(file), file)
    return RunDir(path, writes)


def start_from(config: Config, directory: RunDir, data: str, world: World) -> Checkpoint | None:
    """The newest intact checkpoint of a run, None for a run that has none; the first process looks.

    data: digest of the training rows. Raises InputError where the checkpoint has more steps than the config, or counts
    its place in other rows.
    """
    shelf, last = Shelf(directory.checkpoints), None
    with world.in_turn():
        if world.main:
            last = shelf.newest()
            _check(last, config, data)
    step = int(world.told(str(last.step if last is not None else 0)))
    return last or (shelf.checkpoint(step) if step else None)


def _check(last: Checkpoint | None, config: Config, data: str) -> None:
    if last is not None and last.step > config.train.steps:
        expected = f"at least the {last.step} steps already done"
        raise InputError(expected, str(config.train.steps), field="train.steps")
    if last is not None and last.meta.data != data:
        raise InputError(
            "the rows that the run began with", "others", file=config.data.train, field="data.train",
            hint="a resumed run keeps its rows",
        )  # fmt: skip


def newest_run(config: Config, folders: list[Path]) -> Path | None:
    """The last of the run directories that were made with this config; why others were passed over is logged."""
    for path in reversed(folders):
        reason = _other_than(config, path)
        if reason is None:
            return path
        log.warning("%s passed over: %s", path, reason)
    return None


def is_run(folder: Path) -> bool:
    return (folder / "config.yaml").exists()


def saved_config(run_dir: Path) -> Path:
    """RUN/config.yaml. Raises InputError where there is none, so no run."""
    if not is_run(run_dir):
        raise InputError("a run directory with config.yaml", "none", file=run_dir, field="--resume")
    return run_dir / "config.yaml"


def same_config(config: Config, saved: Config, file: Path) -> None:
    """Raise InputError where a config is not that of the run it goes on with."""
    raise_all(_differences(config, saved, file))


@contextmanager
def alone(run_dir: Path) -> Iterator[None]:
    """Held by the one process that trains in a run directory. The system lets go of the lock of a killed one."""
    descriptor = os.open(run_dir, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError("a run that no other process is training", "one that is", file=run_dir) from error
        except OSError:  # a file system that has no locks
            log.info("%s cannot be locked: see to it that one process at a time trains in it", run_dir)
        yield
    finally:
        os.close(descriptor)


def _make(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise InputError("a folder", "a file", file=path, field="train.run_dir")
    half_done = beside(path / "config.yaml").name  # of a run that was killed before it began
    if path.exists() and any(inside.name != half_done for inside in path.iterdir()):
        raise InputError(
            "a new or empty folder", "a folder with files", file=path, field="train.run_dir",
            hint="--resume goes on with a run",
        )  # fmt: skip
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("a folder that can be made", str(error.strerror), file=path, field="train.run_dir") from error


def _other_than(config: Config, path: Path) -> str | None:
    """Why a folder holds no run of this config, or None."""
    try:
        file = saved_config(path)
        changed = _differences(config, load_config(file), file)
    except InputError as error:
        return f"expected {error.expected}; found {error.found}"
    return "; ".join(f"{c.field} was {c.expected}, is {c.found}" for c in changed) or None


def _differences(config: Config, saved: Config, file: Path) -> list[InputError]:
    now, then = _flat(config), _flat(saved)
    constant = config.optim.schedule == "constant"  # other schedules depend on the number of steps
    free = (*_FREE_TO_CHANGE, "train.steps") if constant else _FREE_TO_CHANGE
    changed = [key for key in now if now[key] != then[key] and not key.startswith(free)]
    return [
        InputError(repr(then[key]), repr(now[key]), file=file, field=key, hint="a resumed run keeps its config")
        for key in changed
    ]


def _flat(config: Config) -> dict[str, object]:
    return {f"{s}.{k}": v for s, keys in config.model_dump(mode="json").items() for k, v in keys.items()}
