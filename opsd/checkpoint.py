"""Checkpoints: a folder that Hugging Face opens, plus what a resumed run needs. Safetensors and JSON, no pickle.

    RUN/checkpoints/step-000100/   model.safetensors or adapter_model.safetensors, config, processor files
                                   trainer.safetensors (AdamW moments, EMA teacher), trainer.json
    RUN/checkpoints/last           link to the newest

A checkpoint is written beside its place and renamed into it, so a killed save leaves the one before it intact.
Order of the data, sampling and dropout are functions of (seed, step): they need no state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opsd.errors import InputError, writing
from opsd.model import LanguageModel
from opsd.optim import Optimizer
from opsd.teacher import Teacher

_FORMAT = 1  # raised when a trainer of today could not read a checkpoint of tomorrow


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    step: int  # updates done


@dataclass(frozen=True)
class State:
    """What `save` writes beside the processor: every tensor whole."""

    weights: dict[str, Tensor] | None  # of a divided model; None where the module has them
    trainer: dict[str, Tensor]

    @classmethod
    def of(cls, model: LanguageModel, optimizer: Optimizer, teacher: Teacher) -> State:
        """Every process of a divided model has to ask."""
        weights = None if model.has_adapter else model.weights()
        return cls(weights, _trainer_state(optimizer, teacher))


def save(folder: Path, step: int, model: LanguageModel, state: State, keep: int) -> Path:
    """Write RUN/checkpoints/step-N atomically, point `last` at it, drop all but the newest `keep`."""
    final = _path(folder, step)
    temporary = folder / f".{final.name}.tmp"
    for left in folder.glob(".step-*"):  # by a run that was killed
        shutil.rmtree(left)
    with writing(temporary):
        temporary.mkdir(parents=True)
        _save_model(model, state.weights, temporary)
        save_file(state.trainer, temporary / "trainer.safetensors")
        (temporary / "trainer.json").write_text(json.dumps({"format": _FORMAT, "step": step}))
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)  # left by a run that was resumed from before it
        os.replace(temporary, final)
        _point(folder / "last", final)
    for step_done in sorted(_steps(folder))[:-keep]:
        old = _path(folder, step_done)
        doomed = old.with_name(f".{old.name}.old")  # out of sight first: a kill half-way leaves no half checkpoint
        os.replace(old, doomed)
        shutil.rmtree(doomed)
    return final


def newest(folder: Path) -> Checkpoint | None:
    """The checkpoint with the most steps, or None. `last` is pointed at it: a kill may have come in between."""
    step = max(_steps(folder), default=None)
    if step is None:
        return None
    path = _path(folder, step)
    _check_meta(path, step)
    with suppress(OSError):  # a run that is only read may be read-only
        _point(folder / "last", path)
    return Checkpoint(path, step)


def restore(checkpoint: Checkpoint, optimizer: Optimizer, teacher: Teacher) -> None:
    """Load AdamW's moments and the teacher; the weights are read by `load_model` from the same folder."""
    optimizer.load_state(_read_trainer(checkpoint, "optimizer/"))
    restore_teacher(checkpoint, teacher)


def restore_teacher(checkpoint: Checkpoint, teacher: Teacher) -> None:
    """Load the teacher alone, to see what it says of a finished run's answers."""
    state = teacher.state()
    saved = _read_trainer(checkpoint, "teacher/") if state else {}
    for name, own in state.items():
        if name not in saved or saved[name].shape != own.shape:
            expected = f"teacher tensor {name} of shape {tuple(own.shape)}"
            raise InputError(expected, "none like it", file=_trainer_file(checkpoint))
    teacher.load_state(saved)


def _save_model(model: LanguageModel, weights: dict[str, Tensor] | None, folder: Path) -> None:
    if model.has_adapter:  # the base stays where it is; adapter_config.json names it
        model.module.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.module.save_pretrained(folder, state_dict=weights)
    for name, content in model.processor_files.items():
        (folder / name).write_bytes(content)


def _trainer_state(optimizer: Optimizer, teacher: Teacher) -> dict[str, Tensor]:
    state = {f"optimizer/{name}": t for name, t in optimizer.state().items()}
    state |= {f"teacher/{name}": t for name, t in teacher.state().items()}
    return {name: t.detach().contiguous() for name, t in state.items()}


def _read_trainer(checkpoint: Checkpoint, prefix: str) -> dict[str, Tensor]:
    """The tensors of a checkpoint's trainer state under a prefix, by the rest of their names."""
    path = _trainer_file(checkpoint)
    try:
        with safe_open(path, framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(prefix)]  # noqa: SIM118 - not a mapping
            return {name.removeprefix(prefix): file.get_tensor(name) for name in names}
    except Exception as error:
        raise InputError("readable safetensors", str(error).splitlines()[0], file=path) from error


def _trainer_file(checkpoint: Checkpoint) -> Path:
    return checkpoint.path / "trainer.safetensors"


def _path(folder: Path, step: int) -> Path:
    return folder / f"step-{step:06d}"


def _steps(folder: Path) -> list[int]:
    names = [path.name for path in folder.glob("step-*")]
    return [int(name[5:]) for name in names if re.fullmatch(r"step-\d{6,}", name)]


def _check_meta(path: Path, step: int) -> None:
    file = path / "trainer.json"
    try:
        meta = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise InputError("a checkpoint written by opsd", str(error), file=file) from error
    if meta != {"format": _FORMAT, "step": step}:
        raise InputError(f"checkpoint format {_FORMAT} at step {step}", repr(meta), file=file)


def _sync(folder: Path) -> None:
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _point(link: Path, target: Path) -> None:
    temporary = link.with_name(".last.tmp")
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(target.name)
    if link.is_dir() and not link.is_symlink():  # a copy of the run that followed links
        shutil.rmtree(link)
    os.replace(temporary, link)
