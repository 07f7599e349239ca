"""The parts of one step: sample a group, let the teacher score it, form the student's loss.

Every sum over tokens carries the weight 1 / (T_i * responses of the step), so micro-batches add up to the mean per
response, then over responses, whatever their size.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd.data import Example
from opsd.engine import response_hidden
from opsd.log import PHASES, peak_memory_mib
from opsd.objectives.distill import distill_loss
from opsd.objectives.logprobs import token_logprobs
from opsd.objectives.reward import group_normalised, reward_loss
from opsd.objectives.sft import sft_loss
from opsd.packing import Unit, first_fit_decreasing, units
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.rewards import accuracy, reward, well_formed
from opsd.rollout import decode
from opsd.run import Run
from opsd.sampling import Sampling
from opsd.teacher import score

_PHASES = {"distill": PHASES, "reward": ("rollout", "student"), "sft": ("student",)}  # where tokens are computed


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

    @property
    def rows(self) -> list[Example]:
        """The row of every response."""
        return [self.examples[owner] for owner in self.responses.owners]


class Sums:
    """Sums of one step over its micro-batches; they stay on the device until they are read."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor | float] = {}

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    def read(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._sums.items()}


def sample(run: Run, examples: list[Example], step: int) -> Group:
    """G responses per row from the student's own view; for `sft`, the rows' own answers instead."""
    if run.config.objective.kind == "sft":
        return _gold(run, examples, step)
    prompts = [run.prompts.student(example) for example in examples]
    teaches = run.config.objective.kind == "distill"
    views = [run.prompts.teacher(example) for example in examples] if teaches else None
    seeds = [run.seed(step, place, "rollout") for place in range(len(examples))]
    responses = run.rollouts(prompts, Sampling.of(run.config.rollout), seeds)
    texts = decode(run.model.tokenizer, responses)
    return Group(examples, prompts, views, responses, texts, _scores(run, examples, responses, texts))


def micro_batches(run: Run, group: Group) -> list[Group]:
    """The step in passes of at most `engine.token_budget` tokens, the responses of a prompt together.

    Only a prompt whose responses do not fit with it is computed more than once, and only a single response that does
    not fit with its prompt makes a larger pass.
    """
    group = with_advantages(run, group)
    sizes = [prompt.length for prompt in group.prompts]
    if group.views is not None:
        sizes = [max(size, view.length) for size, view in zip(sizes, group.views, strict=True)]
    budget, responses = run.config.engine.token_budget, group.responses
    made = units(sizes, responses.owners, responses.lengths, budget)
    bins = first_fit_decreasing([unit.tokens for unit in made], budget)
    return [_part(group, [made[i] for i in chosen]) for chosen in bins]


def with_advantages(run: Run, group: Group) -> Group:
    """Rewards of the texts: raw for the hybrid term, normalised within each prompt's responses for the reward alone."""
    objective = run.config.objective
    if objective.kind != "reward" and not (objective.kind == "distill" and objective.alpha > 0):
        return group
    rewards = [reward(text, row, run.config.rewards) for text, row in zip(group.texts, group.rows, strict=True)]
    values = torch.tensor(rewards, device=run.model.device)
    if objective.kind == "reward":
        values = group_normalised(values, run.config.rollout.group_size)
    return replace(group, advantages=values)


def teach(run: Run, group: Group) -> tuple[Tensor, Tensor | None] | None:
    """The teacher's hidden states of the same tokens under its own prompts, and its head; None without a teacher."""
    if group.views is None:
        return None
    return score(run.teacher, run.model, group.views, group.responses, run.config.engine.share_prefix)


def learn(run: Run, group: Group, target: tuple[Tensor, Tensor | None] | None, sums: Sums) -> Tensor:
    """The loss of one micro-batch, ready for backward."""
    objective, responses = run.config.objective, group.responses
    weights = responses.token_weights / _responses_per_step(run)
    with run.model.mode(train=True):
        hidden = response_hidden(run.model, group.prompts, responses, run.config.engine.share_prefix)
    head = run.model.head
    if objective.kind == "distill":
        assert target is not None
        loss, token_sums = distill_loss(hidden, head, *target, weights, objective)
        sums.add(**token_sums)
        if objective.alpha > 0:  # a branch: alpha = 0 is pure distillation to the bit
            loss = loss + objective.alpha * _reward_term(run, group, hidden, weights)
    elif objective.kind == "reward":
        loss = _reward_term(run, group, hidden, weights)
    else:
        loss = sft_loss(token_logprobs(hidden, head, responses.packed_tokens, objective.workspace_mib), weights)
    sums.add(loss=loss.detach(), tokens=sum(responses.lengths), responses=len(responses.lengths))
    return loss


def log_step(run: Run, step: int, sums: Sums, group: Group) -> None:
    """One line of metrics.jsonl after `step` updates, and now and then some sampled responses.

    Per token: divergence, entropies (nats). Per response: accuracy, format, truncated, response_length (tokens).
    Speeds are response tokens per second of a phase. Beside the rollout, whose texts are read on the host, this is
    where the host waits for the device.
    """
    config = run.config.log
    if config.samples_every and (step % config.samples_every == 0 or step == 1):
        _log_samples(run, step, group)
    if step % config.every and step != run.config.train.steps:
        return
    values, seconds = sums.read() | group.scores, run.clock.read()
    tokens, responses = values.pop("tokens"), values.pop("responses")
    record = {"step": step, "loss": values.pop("loss"), "response_length": tokens / responses}
    for name in ("grad_norm", "lr"):
        record[name] = values.pop(name)
    per_token = ("divergence", "student_entropy", "teacher_entropy")
    record |= {name: value / (tokens if name in per_token else responses) for name, value in values.items()}
    steps = step - run.logged
    record |= {f"{p}_tokens_per_second": steps * tokens / seconds[p] for p in _PHASES[run.config.objective.kind]}
    record |= {"seconds": sum(seconds.values()) / steps, "peak_memory_mib": peak_memory_mib(run.model.device)}
    run.logged = step
    run.directory.append("metrics", record)
    run.progress.step(record)


def _log_samples(run: Run, step: int, group: Group) -> None:
    for example, text in list(zip(group.rows, group.texts, strict=True))[: run.config.log.samples]:
        run.directory.append("samples", {"step": step, "id": example.id, "label": example.label, "response": text})


def _gold(run: Run, examples: list[Example], step: int) -> Group:
    fraction = run.config.objective.teacher_view_fraction
    prompts, tokens = [], []
    for place, example in enumerate(examples):
        privileged = run.seed(step, place, "view") / 2**56 < fraction
        prompts.append(run.prompts.teacher(example) if privileged else run.prompts.student(example))
        answer = run.model.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        tokens.append([*answer, run.model.end_ids[0]])
    responses = Responses.pack(tokens, 1, run.model.pad_id, run.model.device)
    return Group(examples, prompts, None, responses, [str(example.answer) for example in examples], scores={})


def _part(group: Group, chosen: list[Unit]) -> Group:
    """Some units of a step as a group of its own."""
    prompts = [unit.prompt for unit in chosen]
    rows = [i for unit in chosen for i in unit.responses]
    owners = [place for place, unit in enumerate(chosen) for _ in unit.responses]
    index = torch.tensor(rows)
    return Group(
        [group.examples[i] for i in prompts],
        [group.prompts[i] for i in prompts],
        None if group.views is None else [group.views[i] for i in prompts],
        group.responses.take(rows, owners),
        [group.texts[i] for i in rows],
        {},
        None if group.advantages is None else group.advantages[index.to(group.advantages.device)],
    )


def _reward_term(run: Run, group: Group, hidden: Tensor, weights: Tensor) -> Tensor:
    assert group.advantages is not None
    tokens, mib = group.responses.packed_tokens, run.config.objective.workspace_mib
    logprobs = token_logprobs(hidden, run.model.head, tokens, mib)
    return reward_loss(logprobs, group.advantages, group.responses.lengths, weights)


def _scores(run: Run, examples: list[Example], responses: Responses, texts: list[str]) -> dict[str, float]:
    owners = [examples[owner] for owner in responses.owners]
    ended = set(run.model.end_ids)
    rows = zip(responses.tokens.tolist(), responses.lengths, strict=True)
    return {
        "accuracy": sum(accuracy(text, owner.label) for text, owner in zip(texts, owners, strict=True)),
        "format": sum(well_formed(text) for text in texts),
        "truncated": sum(tokens[length - 1] not in ended for tokens, length in rows),
    }


def _responses_per_step(run: Run) -> int:
    per_prompt = 1 if run.config.objective.kind == "sft" else run.config.rollout.group_size
    return run.config.train.prompts_per_step * per_prompt
