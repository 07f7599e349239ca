"""Checkpoints: a folder that Hugging Face opens, plus what a resumed run needs. Safetensors and JSON, no pickle.

    RUN/checkpoints/step-000100/   model.safetensors or adapter_model.safetensors, config, processor files
                                   trainer.safetensors (AdamW moments, EMA teacher)
                                   trainer.json (`Meta`: steps done, place in the data, held-out score)
                                   manifest.json (size and SHA-256 of every file)

A checkpoint is written beside its place, synced to the disk and renamed into it: what has its name is whole.
`opsd.shelf` says which of them is taken, and which are kept.

Nothing else moves from step to step. Order of the data, sampling and dropout are functions of (seed, step), and so is
the learning rate: there is no state of a random generator, a loader or a scheduler to save. The teacher's cache is
addressed by content: a resumed run finds what is in its folder, and computes what is not.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from opsd import manifest
from opsd.durable import beside, rename
from opsd.errors import InputError, writing
from opsd.model import LanguageModel
from opsd.optim import Optimizer
from opsd.teacher import Teacher

_FORMAT = 2  # raised when a trainer of today could not read a checkpoint of tomorrow


@dataclass(frozen=True)
class Meta:
    """What trainer.json says."""

    step: int  # updates done
    rows: int  # rows of the training data used so far, over all epochs
    data: str  # digest of all training rows: the place means nothing in others
    score: float | None = None  # of held-out rows, by `scored`; None where this step was not measured
    scored: str | None = None  # "accuracy" or "loss"
    format: int = _FORMAT


@dataclass(frozen=True)
class Checkpoint:
    path: Path
    meta: Meta

    @property
    def step(self) -> int:
        return self.meta.step


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


def save(path: Path, meta: Meta, model: LanguageModel, state: State) -> None:
    """Write the folder `path`, all of it or nothing. One of that name, left by an abandoned future, is replaced.

    Raises InputError where the weights are no numbers any more, OSError where the disk does not take them.
    """
    _check_finite(model, state)
    temporary = beside(path)
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        try:
            temporary.mkdir(parents=True)
            _save_model(model, state.weights, temporary)
            save_file(state.trainer, temporary / "trainer.safetensors")
            (temporary / "trainer.json").write_text(json.dumps(asdict(meta)), encoding="utf-8")
            manifest.seal(temporary)
            shutil.rmtree(path, ignore_errors=True)
            rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)  # a disk that is full gets its room back
            raise


def read_meta(path: Path) -> Meta:
    """trainer.json of a checkpoint. Raises InputError for one that this trainer did not write."""
    file = path / "trainer.json"
    try:
        said = json.loads(file.read_text(encoding="utf-8"))
        if said["format"] != _FORMAT:
            raise InputError(f"checkpoint format {_FORMAT}", repr(said["format"]), file=file)
        return Meta(**said)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError("a checkpoint written by opsd", str(error), file=file) from error


def restore(checkpoint: Checkpoint, optimizer: Optimizer, teacher: Teacher) -> None:
    """Load AdamW's moments and the teacher; the weights are read by `load_model` from the same folder."""
    optimizer.load_state(_read_trainer(checkpoint, "optimizer/"))
    optimizer.skipped.load_state(_read_trainer(checkpoint, "skipped/"))
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


def _check_finite(model: LanguageModel, state: State) -> None:
    """A save waits for the device anyway."""
    for name, weight in (model.trainable() if state.weights is None else state.weights).items():
        if not torch.isfinite(weight.detach()).all():
            hint = "a lower optim.lr? --resume goes on from the last checkpoint"
            raise InputError("weights that are finite numbers", f"others in {name}", hint=hint)


def _save_model(model: LanguageModel, weights: dict[str, Tensor] | None, folder: Path) -> None:
    if model.has_adapter:  # the base stays where it is; adapter_config.json names it
        model.module.save_pretrained(folder, save_embedding_layers=False)
    else:
        model.module.save_pretrained(folder, state_dict=weights)
    for name, content in model.processor_files.items():
        (folder / name).write_bytes(content)


def _trainer_state(optimizer: Optimizer, teacher: Teacher) -> dict[str, Tensor]:
    state = {f"optimizer/{name}": t for name, t in optimizer.state().items()}
    state |= {f"skipped/{name}": t for name, t in optimizer.skipped.state().items()}
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
