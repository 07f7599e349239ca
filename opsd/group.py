"""What was sampled for the rows of a step, and its division into passes of the model."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd.config import Config
from opsd.data import Example
from opsd.objectives.reward import group_normalised
from opsd.packing import Unit, first_fit_decreasing, units
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.rewards import reward
from opsd.transfer import indices, to_device


@dataclass(frozen=True)
class Group:
    """Rows of a step, the prompt the student answers to each, what the teacher sees, and the responses."""

    examples: list[Example]
    prompts: list[Prompt]
    views: list[Prompt] | None  # the teacher's; None without a teacher
    responses: Responses
    texts: list[str]  # decoded responses
    scores: dict[str, float]  # sums over responses of what the answers are worth; none for gold answers
    advantages: Tensor | None = None  # (R,) fp32, of every response
    again: tuple[bool, ...] = ()  # of every prompt: another pass of the step has responses to it too
    idle: bool = False  # counts for nothing: its pass keeps step with other processes

    @property
    def tokens(self) -> int:
        """As `passes` counts them: a prompt in its longer view, and the responses."""
        return sum(self.roots) + sum(self.responses.lengths)

    @property
    def roots(self) -> list[int]:
        """Tokens of every prompt, of its longer view."""
        views = self.views if self.views is not None else self.prompts
        return [max(prompt.length, view.length) for prompt, view in zip(self.prompts, views, strict=True)]

    @property
    def rows(self) -> list[Example]:
        """The row of every response."""
        return [self.examples[owner] for owner in self.responses.owners]


def micro_batches(config: Config, group: Group, budget: int | None = None) -> list[Group]:
    """The step with its advantages, in passes of at most `budget` tokens (None: `engine.token_budget`)."""
    tokens = budget if budget is not None else config.engine.token_budget
    assert tokens != "auto", "a run has a number in its place"
    return split(with_advantages(config, group), tokens)


def split(group: Group, budget: int) -> list[Group]:
    """Passes of at most `budget` tokens, the responses of a prompt together.

    Only a prompt whose responses do not fit with it is computed more than once, and only a single response that does
    not fit with its prompt makes a larger pass.
    """
    responses = group.responses
    made = units(group.roots, responses.owners, responses.lengths, budget)
    bins = first_fit_decreasing([unit.tokens for unit in made], budget)
    parts = Counter(unit.prompt for unit in made)
    return [_part(group, [made[i] for i in chosen], parts) for chosen in bins]


def with_advantages(config: Config, group: Group) -> Group:
    """Rewards of the texts: raw for the hybrid term, normalised within each prompt's responses for the reward alone."""
    objective = config.objective
    if objective.kind != "reward" and not (objective.kind == "distill" and objective.alpha > 0):
        return group
    rewards = [reward(text, row, config.rewards) for text, row in zip(group.texts, group.rows, strict=True)]
    values = to_device(torch.tensor(rewards), group.responses.tokens.device)
    if objective.kind == "reward":
        values = group_normalised(values, config.rollout.group_size)
    return replace(group, advantages=values)


def _part(group: Group, chosen: list[Unit], parts: Counter[int]) -> Group:
    """Some units of a step as a group of its own."""
    prompts = [unit.prompt for unit in chosen]
    rows = [i for unit in chosen for i in unit.responses]
    owners = [place for place, unit in enumerate(chosen) for _ in unit.responses]
    return Group(
        [group.examples[i] for i in prompts],
        [group.prompts[i] for i in prompts],
        None if group.views is None else [group.views[i] for i in prompts],
        group.responses.take(rows, owners),
        [group.texts[i] for i in rows],
        {},
        None if group.advantages is None else group.advantages.index_select(0, indices(rows, group.advantages.device)),
        tuple(parts[i] > 1 for i in prompts),
    )
