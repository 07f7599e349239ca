"""What the engine is timed at: for each task our step, the step it is measured against, and a gate that compares both.

A gate raises AssertionError when the two do not compute the same. Every task takes its model, so that depth and device
are the caller's choice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from bench.engine_cases import Shape, prompt, responses
from opsd.config import EngineConfig
from opsd.engine import response_hidden
from opsd.model import LanguageModel
from opsd.prefix_store import open_store
from opsd.rollout import rollout
from opsd.sampling import Sampling
from opsd.teacher_cache import TeacherCache

OURS = "opsd"


@dataclass(frozen=True)
class Task:
    """A row of the targets: the peer's time divided by ours is to be at least `target`."""

    name: str
    shape: Shape
    target: float
    peer: str
    build: Callable[[LanguageModel, Shape], Steps]

    def __str__(self) -> str:
        return f"{self.name} {self.shape}"


@dataclass(frozen=True)
class Steps:
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    gate: Callable[[], None]


def teacher(model: LanguageModel, shape: Shape) -> Steps:
    """Hidden states of G responses under prompt and rationale, no gradient; the peer is the plain twin."""
    vocab = model.head.weight.shape[0]
    prompts = [prompt(shape.prompt + shape.rationale, 0, vocab)]
    answers = responses([shape.response] * shape.group, shape.group, vocab, model.device)

    @torch.no_grad()
    def step(shared: bool) -> Tensor:
        return response_hidden(model, prompts, answers, shared)

    return Steps(lambda: step(True), lambda: step(False), lambda: _equal(step(True), step(False)))


def second_epoch(model: LanguageModel, shape: Shape) -> Steps:
    """The same when the teacher's cache has the prompt from an earlier epoch."""
    vocab = model.head.weight.shape[0]
    prompts = [prompt(shape.prompt + shape.rationale, 0, vocab)]
    answers = responses([shape.response] * shape.group, shape.group, vocab, model.device)
    store = open_store(EngineConfig(), model.device)
    assert store is not None
    cache = TeacherCache(store)

    @torch.no_grad()
    def cached() -> Tensor:
        return cache.hidden(model, None, prompts, answers, [False])

    @torch.no_grad()
    def plain() -> Tensor:
        return response_hidden(model, prompts, answers, share_prefix=False)

    def gate() -> None:
        cached()  # the first epoch
        _equal(cached(), plain())
        assert cache.metrics()["teacher_cache_hit_rate"] == 0.5

    return Steps(cached, plain, gate)


def student(model: LanguageModel, shape: Shape) -> Steps:
    """Forward and backward of the student's pass to the gradient of every weight."""
    vocab = model.head.weight.shape[0]
    prompts = [prompt(shape.prompt, 0, vocab)]
    answers = responses([shape.response] * shape.group, shape.group, vocab, model.device)

    direction = torch.randn(shape.tokens, model.head.weight.shape[1], device=model.device)

    def step(shared: bool) -> Tensor:
        model.module.zero_grad()
        hidden = response_hidden(model, prompts, answers, shared)
        (hidden * direction).sum().backward()
        return hidden.detach()

    def gate() -> None:
        found = [(step(shared), [p.grad.clone() for p in model.trainable().values()]) for shared in (True, False)]
        (ours, gradients), (plain, truth) = found
        _equal(ours, plain)
        for gradient, true in zip(gradients, truth, strict=True):
            _equal(gradient, true)

    return Steps(lambda: step(True), lambda: step(False), gate)


def sampling(model: LanguageModel, shape: Shape) -> Steps:
    """G greedy responses of T tokens each; the peer is `generate` with the prompt repeated G times."""
    asked = prompt(shape.prompt, 0, model.head.weight.shape[0])
    how = Sampling(shape.group, shape.response, temperature=0.0)
    ids = asked.inputs["input_ids"].to(model.device).repeat(shape.group, 1)
    suppressed = model.suppressed_ids

    def ours() -> Tensor:
        return rollout(model, [asked], how, [0]).tokens

    def generate() -> Tensor:
        out = model.module.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=shape.response,
            do_sample=False,
            suppress_tokens=suppressed,
            eos_token_id=model.end_ids,
        )
        return out[:, shape.prompt :]

    def gate() -> None:
        assert torch.equal(ours(), generate()), "rollout and generate give different tokens"

    return Steps(ours, generate, gate)


def _equal(found: Tensor, wanted: Tensor) -> None:
    error = ((found - wanted).norm() / wanted.norm().clamp_min(1e-30)).item()
    limit = 1e-4 if found.dtype == torch.float32 else 3e-2
    assert error <= limit, f"off by {error:.1e}"


TASKS = (
    Task("teacher", Shape(1500, 500, 300, 8), 3.2, "plain", teacher),
    Task("teacher", Shape(300, 400, 512, 8), 1.7, "plain", teacher),
    Task("student", Shape(1500, 0, 300, 8), 2.8, "plain", student),
    Task("rollout", Shape(300, 0, 64, 8), 1.5, "generate", sampling),
    Task("second epoch", Shape(1500, 500, 300, 1), 5.0, "plain", second_epoch),
    Task("nothing shared, teacher", Shape(1500, 500, 300, 1), 0.95, "plain", teacher),
    Task("nothing shared, student", Shape(1500, 0, 300, 1), 0.95, "plain", student),
)
