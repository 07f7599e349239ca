"""What must hold before the first step: of the processes, the rows, their prompts, the loss."""

from __future__ import annotations

import torch

from opsd.config import Config
from opsd.data import Example, labelled
from opsd.errors import InputError, explained, raise_all
from opsd.model import LanguageModel
from opsd.objectives.distill import distill_loss
from opsd.prompt_cache import VIEWS, PromptCache, verify
from opsd.prompts import can_teach
from opsd.served import check_text_only
from opsd.world import World


def check_world(config: Config, world: World) -> None:
    """Raise InputError for settings that so many processes cannot have."""
    if config.train.prompts_per_step % world.size:
        expected = f"a multiple of the {world.size} processes"
        raise InputError(expected, str(config.train.prompts_per_step), field="train.prompts_per_step")
    if world.size > 1 and config.model.device not in ("auto", "cpu"):
        expected = f"auto or cpu with {world.size} processes, each of which has a device"
        raise InputError(expected, config.model.device, field="model.device")
    if world.size > 1 and config.optim.in_backward:
        expected = f"false with {world.size} processes, whose gradients are added up when all are whole"
        raise InputError(expected, "true", field="optim.in_backward")


def check_data(train: list[Example], held_out: dict[str, list[Example]], config: Config) -> None:
    """Rows to train on, and those of "validation" and "test", carry what will be asked of them."""
    check_rows(train, config)
    if config.rollout.server:
        check_text_only(train)
    if config.checkpoint.best == "loss":
        check_rows(labelled(held_out["validation"]), config)
    for split, rows in held_out.items():
        if not any(row.label for row in rows):
            raise InputError("a label on some row", "none", file=getattr(config.data, split), field="label")


def check_rows(rows: list[Example], config: Config) -> None:
    """Rows must carry what the objective and the teacher's view will read."""
    objective, needed = config.objective, {}
    if objective.kind == "sft":
        needed["answer"] = "an answer to learn (objective.kind is sft)"
    uses_reward = objective.kind == "reward" or objective.alpha > 0
    if uses_reward and config.rewards.accuracy:
        needed["label"] = "a label to reward (rewards.accuracy is not 0)"
    if objective.kind == "distill" and config.prompts.privilege != "none":
        needed[config.prompts.privilege] = f"a {config.prompts.privilege} (prompts.privilege)"
    raise_all([
        InputError(expected, "nothing", file=row.file, line=row.line, field=field)
        for row in rows
        for field, expected in needed.items()
        if getattr(row, field) is None
    ])  # fmt: skip


def check_prompts(
    prompts: PromptCache, train: list[Example], held_out: dict[str, list[Example]], config: Config, world: World
) -> None:
    """Build every prompt that will be asked for, each process its share; what fits stays in the cache."""
    skip = config.data.on_error == "skip"
    privileged = config.objective.kind == "distill" or config.objective.teacher_view_fraction > 0
    verify(prompts, world.share(train), VIEWS if privileged else VIEWS[:1], skip=skip)
    measured = config.evaluate.teacher or config.checkpoint.best == "loss"
    for rows in map(labelled, held_out.values()):
        taught = measured and can_teach(rows, config.prompts)
        verify(prompts, world.share(rows), VIEWS if taught else VIEWS[:1], skip=skip)


def check_loss(model: LanguageModel, config: Config) -> None:
    """One token through the loss: a missing backend or too small a workspace is told now, not after a rollout."""
    if config.objective.kind == "distill":
        weight = model.head.weight
        token = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=model.device, requires_grad=True)
        with explained("settings that fused_token_kl takes for this model", field="objective"):
            distill_loss(token, model.head, token.detach(), None, torch.ones(1, device=model.device), config.objective)
