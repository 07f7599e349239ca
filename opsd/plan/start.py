"""`engine.token_budget: auto`: the largest passes that fit, found before the first step."""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from opsd.config import Config
from opsd.data import Example
from opsd.errors import InputError
from opsd.model import LanguageModel
from opsd.plan.device import available
from opsd.plan.longest import Views, longest_of
from opsd.plan.outline import outline
from opsd.plan.plan import make_plan, room
from opsd.plan.workload import Workload

log = logging.getLogger(__name__)


def fitting_budget(
    config: Config, model: LanguageModel, rows: Sequence[Example], views: Views, processes: int = 1
) -> int:
    """Tokens of a pass on the device the model is on. Raises InputError where not even one response fits.

    processes: of this machine, which share the memory of its host.
    """
    if not config.engine.share_prefix or model.shards is not None:
        what = "a divided model" if model.shards is not None else "the plain twin"
        raise InputError(f"a number: {what} is not planned", "auto", field="engine.token_budget")
    cuda = model.device.type == "cuda"
    memory = available(torch.device(model.device)) // (1 if cuda else processes)
    shapes = outline(config.model, config.engine, model.processor, cuda)
    work = Workload.of(config, longest_of(rows, views, config.objective.kind == "distill"))
    plan = make_plan(config, shapes, work, cuda, memory)
    if plan.largest is None:
        found = f"{plan.peak / 2**20:.0f} MiB for one response with its prompt, of {room(memory) / 2**20:.0f} MiB"
        raise InputError("memory for a step", found, field="engine.token_budget", hint="--dry-run shows what takes it")
    log.info("passes of at most %d tokens: %.0f MiB of %.0f", plan.largest, plan.peak / 2**20, room(memory) / 2**20)
    return plan.largest
