"""The student of a finished run, and its greedy answers."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from pathlib import Path

import torch

from opsd import manifest
from opsd.checkpoint import Checkpoint
from opsd.config import Config, RolloutConfig, load_config
from opsd.errors import InputError
from opsd.fit import Budget
from opsd.loading import load_model
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.rollout import Rollouts, decode
from opsd.sampling import Sampling
from opsd.shelf import Shelf


def finished_run(run_dir: Path, best: bool = False) -> tuple[Config, Path]:
    """The config of a run directory and its newest checkpoint, or its best. Raises `InputError` when there is none."""
    config = load_config(run_dir / "config.yaml")
    shelf = Shelf(run_dir / "checkpoints")
    found = _best(shelf, config) if best else shelf.newest()
    if found is None:
        raise InputError("a checkpoint to evaluate", "none", file=run_dir / "checkpoints")
    return config, found.path


def _best(shelf: Shelf, config: Config) -> Checkpoint | None:
    """By what the run kept it for."""
    by = config.checkpoint.best
    if by == "none":
        raise InputError("a run with checkpoint.best=accuracy or loss", "none", file=shelf.folder, field="--checkpoint")
    found = shelf.best(by)
    if found is not None and (damage := manifest.damage(found.path)) is not None:
        raise InputError("an intact checkpoint", damage, file=found.path)
    return found


def load_student(config: Config, checkpoint_path: Path | None) -> LanguageModel:
    """The model of a checkpoint, or None: the one the run started from, on as many threads as the run had."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    return load_model(config.model, checkpoint=checkpoint_path, engine=config.engine)


def answer(
    model: LanguageModel,
    prompts: Iterable[Prompt],
    batch_size: int,
    config: RolloutConfig,
    budget: Budget | None = None,
) -> list[str]:
    """Greedy answers, one per prompt, of the length and to the stop strings of a rollout.

    No more prompts are taken at a time than are answered together. budget: of the passes over them.
    """
    sampling = Sampling.greedy(config.max_new_tokens, config.stop)
    rollouts = Rollouts(
        model, config.slots, config.graphs, budget=budget
    )  # its graphs are of the weights the model wears now
    texts: list[str] = []
    coming = iter(prompts)
    while batch := list(islice(coming, batch_size)):
        texts += decode(model.tokenizer, rollouts(batch, sampling, [0] * len(batch)))
    return texts
