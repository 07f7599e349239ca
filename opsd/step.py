"""The parts of one step: sample a group, let the teacher score it, form the student's loss.

Every sum over tokens carries the weight 1 / (T_i * responses of the step), so micro-batches add up to the mean per
response, then over responses, whatever their size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from opsd.config import Config
from opsd.data import Example
from opsd.engine import response_hidden
from opsd.fit import within_memory
from opsd.group import Group, micro_batches, split
from opsd.leaks import answer_leaks
from opsd.metrics import Sums
from opsd.objectives.distill import distill_loss
from opsd.objectives.logprobs import token_logprobs
from opsd.objectives.overlap import topk_overlap
from opsd.objectives.reward import clipped_loss, reward_loss
from opsd.objectives.sft import sft_loss
from opsd.responses import Responses
from opsd.rewards import accuracy, well_formed
from opsd.rollout import decode
from opsd.run import Run
from opsd.sampling import Sampling
from opsd.teacher import score
from opsd_kernels import Head


def sample(run: Run, examples: list[Example], step: int, greedy: bool = False) -> Group:
    """G responses per row from the student's own view; for `sft`, the rows' own answers instead.

    greedy: as held-out rows are measured, one response per row, and no answer seen with privilege.
    """
    if run.config.objective.kind == "sft":
        return _gold(run, examples, step, 0.0 if greedy else run.config.objective.teacher_view_fraction)
    prompts = [run.prompts.student(example) for example in examples]
    teaches = run.config.objective.kind == "distill"
    views = [run.prompts.teacher(example) for example in examples] if teaches else None
    seeds = [run.seed(step, place, "rollout") for place in map(run.world.place, range(len(examples)))]
    responses = run.rollouts(prompts, Sampling.of(run.config.rollout, greedy), seeds)
    texts = decode(run.model.tokenizer, responses)
    return Group(examples, prompts, views, responses, texts, _scores(run, examples, responses, texts))


def passes(run: Run, group: Group) -> list[Group]:
    """The micro-batches of the step. The layers of a divided model are gathered by all processes together, so one that
    has fewer repeats its last, which then counts for nothing."""
    parts = micro_batches(run.config, group, run.budget.tokens)
    if run.model.shards is None:
        return parts
    return parts + [replace(parts[-1], idle=True)] * (int(run.world.largest(len(parts))) - len(parts))


def teach(run: Run, group: Group) -> tuple[Tensor, Head | None] | None:
    """The teacher's hidden states of the same tokens under its own prompts, and its head; None without a teacher."""
    if group.views is None:
        return None
    share, again = run.config.engine.share_prefix, group.again or None
    return score(run.teacher, run.model, group.views, group.responses, share, run.teacher_cache, again)


def fitted(run: Run, group: Group, step: int, gradients: Callable[[Run, Group, int], Sums]) -> Sums:
    """The gradients of an update, in smaller passes where memory runs out.

    Not of a divided model: the others would wait in the middle of a pass for one that begins again.
    """
    if run.model.shards is not None:
        return gradients(run, group, step)

    def largest() -> int:
        return max(part.tokens for part in split(group, run.budget.tokens))

    def again() -> None:
        run.optimizer.restart()
        run.progress.say(f"out of memory: passes take at most {run.budget.tokens} tokens from here on")

    return within_memory(lambda: gradients(run, group, step), run.budget, largest, again, run.model.device)


def learn(run: Run, group: Group, target: tuple[Tensor, Head | None] | None, sums: Sums, train: bool = True) -> Tensor:
    """The loss of one micro-batch, ready for backward. train: with dropout."""
    objective, responses = run.config.objective, group.responses
    weights = responses.token_weights / responses_per_step(run.config)
    if group.idle:
        weights, sums = torch.zeros_like(weights), Sums()
    with run.model.mode(train):
        hidden = response_hidden(run.model, group.prompts, responses, run.config.engine.share_prefix)
    head = run.model.head

    def logprobs() -> Tensor:
        return token_logprobs(hidden, head, responses.packed_tokens, objective.workspace_mib)

    if objective.kind == "distill":
        assert target is not None
        loss, tokens = distill_loss(hidden, head, *target, weights, objective)
        sums.tokens(group, tokens)
        if sums.logged:
            overlap = topk_overlap(hidden, head, *target)
            sums.add(topk_overlap=overlap.sum(), overlap_tokens=len(overlap))
        if objective.alpha > 0:  # a branch: alpha = 0 is pure distillation to the bit
            assert group.advantages is not None
            loss = loss + objective.alpha * reward_loss(logprobs(), group.advantages, responses.lengths, weights)
    elif objective.kind == "reward":
        assert group.advantages is not None
        old, clip = responses.packed_logprobs, objective.ratio_clip
        loss, clipped = clipped_loss(logprobs(), old, group.advantages, responses.lengths, weights, clip)
        sums.add(clipped=clipped)
    else:
        loss = sft_loss(logprobs(), weights)
    sums.add(loss=loss.detach(), tokens=sum(responses.lengths), responses=len(responses.lengths))
    return loss


def _gold(run: Run, examples: list[Example], step: int, fraction: float) -> Group:
    prompts, tokens = [], []
    for item, example in enumerate(examples):
        place = run.world.place(item)
        privileged = run.seed(step, place, "view") / 2**56 < fraction
        prompts.append(run.prompts.teacher(example) if privileged else run.prompts.student(example))
        answer = run.model.tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        tokens.append([*answer, run.model.end_ids[0]])
    responses = Responses.pack(tokens, 1, run.model.pad_id, run.model.device)
    return Group(examples, prompts, None, responses, [str(example.answer) for example in examples], scores={})


def _scores(run: Run, examples: list[Example], responses: Responses, texts: list[str]) -> dict[str, float]:
    owners = [examples[owner] for owner in responses.owners]
    ended = set(run.model.end_ids)
    stops = run.config.rollout.stop
    rows = zip(responses.tokens.tolist(), responses.lengths, texts, strict=True)
    return {
        "accuracy": sum(accuracy(text, owner.label) for text, owner in zip(texts, owners, strict=True)),
        "format": sum(well_formed(text) for text in texts),
        "leak_rate": sum(bool(answer_leaks(text)) for text in texts),
        "truncated": sum(t[n - 1] not in ended and not any(stop in text for stop in stops) for t, n, text in rows),
    }


def responses_per_step(config: Config) -> int:
    per_prompt = 1 if config.objective.kind == "sft" else config.rollout.group_size
    return config.train.prompts_per_step * per_prompt
