"""A few rows once more through rollout, teacher and divergence: by the starting model and by a checkpoint.

Letters: N tokens of an answer, V vocabulary, D width, K candidates.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd.adapter import without_adapter
from opsd.answers import load_student
from opsd.checkpoint import Checkpoint, restore_teacher
from opsd.config import Config
from opsd.data import Example
from opsd.decoder import Decoder
from opsd.engine import response_hidden
from opsd.errors import MediumError
from opsd.logits import logits_of
from opsd.model import LanguageModel
from opsd.objectives.distill import token_divergence
from opsd.page.tokens import name, pieces
from opsd.prompts import PromptBuilder, can_teach
from opsd.responses import Responses
from opsd.rewards import accuracy
from opsd.rollout import decode, rollout
from opsd.sampling import Sampling
from opsd.teacher import LiveTeacher, Teacher, build_teacher, score
from opsd_kernels import Head

CANDIDATES = 5  # most likely tokens shown of either side


class Candidate(NamedTuple):
    text: str
    probability: float
    written: bool  # it is the token of the answer


@dataclass(frozen=True)
class Side:
    """What one of the two distributions is at a token's place. A number that is not finite is None."""

    probability: float | None  # of the token that was written
    entropy: float | None  # nats
    top: list[Candidate]


@dataclass(frozen=True)
class Token:
    text: str  # what it adds to the answer
    divergence: float | None  # nats; None without a teacher's view, or where it is not finite
    student: Side
    teacher: Side | None


@dataclass(frozen=True)
class Answer:
    """A greedy answer; `right` is None for a row without a label."""

    text: str
    right: bool | None
    tokens: list[Token]

    @property
    def divergence(self) -> float | None:
        """Mean over the tokens, as the loss takes it."""
        known = [token.divergence for token in self.tokens if token.divergence is not None]
        return sum(known) / len(known) if known else None


class Replayed(NamedTuple):
    row: Example
    before: Answer
    after: Answer


def replay(config: Config, last: Checkpoint, rows: list[Example]) -> list[Replayed]:
    """Answers of the model the run started from and of its checkpoint `last`, each beside its teacher of that time.

    With an adapter the start is the model with the adapter off; otherwise it is loaded, and let go before the other is.
    Rows are checked by the prompts built from them: `InputError` for media, length or text that does not fit.
    """
    if config.model.adapter != "lora":
        before = _answers(load_student(config, None), LiveTeacher(), config, rows)
        model = load_student(config, last.path)
    else:
        model = load_student(config, last.path)
        with without_adapter(model.module):
            before = _answers(model, LiveTeacher(), config, rows)
    after = _answers(model, _teacher(config, last, model), config, rows)
    return [Replayed(*of_row) for of_row in zip(rows, before, after, strict=True)]


def decodes(row: Example, config: Config) -> bool:
    """Whether the row's files decode. Raises `InputError` where they do not and the run did not skip such rows."""
    decode = Decoder(config.media)
    try:
        for _, kind, path in row.media():
            decode(kind, path)
    except MediumError as error:
        if config.data.on_error != "skip":
            raise row.problem("prompt", error.expected, f"{error.found} in {error.file}") from error
        return False
    return True


def _teacher(config: Config, last: Checkpoint, model: LanguageModel) -> Teacher:
    """The teacher as the run left it; the student itself where the run had none."""
    if config.objective.kind != "distill":
        return LiveTeacher()
    teacher = build_teacher(config.teacher, model)
    restore_teacher(last, teacher)
    return teacher


@torch.no_grad()
def _answers(model: LanguageModel, teacher: Teacher, config: Config, rows: list[Example]) -> list[Answer]:
    """One greedy answer per row, scored one by one: memory is that of the longest."""
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    share, size = config.engine.share_prefix, config.evaluate.batch_size
    sampling = Sampling.greedy(config.rollout.max_new_tokens, config.rollout.stop)
    found = []
    for some in (rows[first : first + size] for first in range(0, len(rows), size)):
        prompts = [builder.student(row) for row in some]
        slots = config.rollout.slots
        responses = rollout(model, prompts, sampling, [0] * len(some), slots=slots, share_prefix=share)
        for place, (row, prompt, text) in enumerate(
            zip(some, prompts, decode(model.tokenizer, responses), strict=True)
        ):
            one = responses.take([place], [0])
            with model.mode(train=False):
                own = response_hidden(model, [prompt], one, share)
            other = None
            if can_teach([row], config.prompts):
                other = score(teacher, model, [builder.teacher(row)], one, share)
            right = None if row.label is None else bool(accuracy(text, row.label))
            found.append(Answer(text, right, _tokens(model, own, other, one, config)))
    return found


def _tokens(
    model: LanguageModel,
    own: Tensor,  # (N, D)
    other: tuple[Tensor, Head | None] | None,  # the teacher's states (N, D) and head; None without a view
    response: Responses,
    config: Config,
) -> list[Token]:
    ids = response.packed_tokens
    target, target_head = other if other is not None else (own, None)  # the student's own numbers need no teacher
    values, stats = token_divergence(own, model.head, target, target_head, config.objective, tokens=ids)
    heads = model.head, model.head if target_head is None else target_head
    sides = [
        _side(model, hidden, head, ids, (logprob, entropy, lse), config)
        for hidden, head, logprob, entropy, lse in (
            (own, heads[0], stats.student_logprob, stats.student_entropy, stats.student_lse),
            (target, heads[1], stats.teacher_logprob, stats.teacher_entropy, stats.teacher_lse),
        )
    ]
    student, teacher = sides[0], sides[1] if other is not None else [None] * len(sides[0])
    divergences = [_finite(d) if other is not None else None for d in values.tolist()]
    texts = pieces(model.tokenizer, ids.tolist())
    return [Token(*parts) for parts in zip(texts, divergences, student, teacher, strict=True)]


def _side(
    model: LanguageModel,
    hidden: Tensor,  # (N, D)
    head: Head,  # weight (V, D)
    ids: Tensor,  # (N,)
    stats: tuple[Any, Tensor, Tensor],  # (N,) each: log-probability, entropy, log-sum-exp
    config: Config,
) -> list[Side]:
    logprob, entropy, lse = stats
    objective = config.objective
    logits, chosen = top_tokens(hidden, head, min(CANDIDATES, len(head.weight)), objective.workspace_mib)
    probabilities = (logits / objective.temperature - lse[:, None]).exp()
    return [
        Side(_finite(math.exp(written)), _finite(nats), _candidates(model, token, likely, shares))
        for written, nats, token, likely, shares in zip(
            logprob.tolist(), entropy.tolist(), ids.tolist(), chosen.tolist(), probabilities.tolist(), strict=True
        )
    ]


def top_tokens(
    hidden: Tensor,  # (N, D)
    head: Head,  # weight (V, D)
    count: int,  # K
    workspace_mib: int,
) -> tuple[Tensor, Tensor]:  # (N, K) fp32, (N, K) int64
    """Logits and ids of the most likely tokens, most likely first; no more rows of logits at once than fit."""
    rows = max(1, workspace_mib * 2**20 // (4 * len(head.weight)))
    logits, ids = zip(*(logits_of(part, head).topk(count) for part in hidden.split(rows)), strict=True)
    return torch.cat(logits), torch.cat(ids)


def _candidates(model: LanguageModel, written: int, ids: list[int], probabilities: list[float]) -> list[Candidate]:
    return [
        Candidate(name(model.tokenizer, token), p, token == written)
        for token, p in zip(ids, probabilities, strict=True)
        if math.isfinite(p)
    ]


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
