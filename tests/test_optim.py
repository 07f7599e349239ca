"""The optimizer against a plain AdamW loop; the schedule against its closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from opsd.config import OptimConfig
from opsd.optim import Optimizer, Skipped, schedule

STEPS = 6


class Toy:
    """As much of a model as the optimizer asks for."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.parameters = {n: nn.Parameter(torch.randn(3, 4, generator=generator)) for n in ("a", "b")}

    def trainable(self) -> dict[str, nn.Parameter]:
        return self.parameters


def gradients(step: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [5.0 * torch.randn(3, 4, generator=generator) for _ in range(2)]  # norm about 24


CONFIGS = {
    "defaults": {"lr": 1e-2},
    "no clip": {"lr": 1e-2, "max_grad_norm": None},
    "tight clip": {"lr": 1e-2, "max_grad_norm": 1e-7, "eps": 1e-6},  # AdamW sees the clip through eps
    "decay": {"lr": 1e-2, "weight_decay": 0.3},
    "betas": {"lr": 1e-2, "betas": (0.5, 0.7)},
    "linear": {"lr": 1e-2, "schedule": "linear", "warmup_steps": 2},
    "cosine": {"lr": 1e-2, "schedule": "cosine"},
}


def factor(config: OptimConfig, step: int) -> float:
    warm = config.warmup_steps
    if step < warm:
        return (step + 1) / warm
    done = (step - warm) / (STEPS - warm)
    return {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}[config.schedule]


@pytest.mark.parametrize("values", CONFIGS.values(), ids=CONFIGS.keys())
def test_updates_are_those_of_a_plain_adamw_loop(values):
    config, ours, theirs = OptimConfig(**values), Toy(), Toy()
    optimizer = Optimizer(ours, config, STEPS)
    decay, betas, eps = config.weight_decay, config.betas, config.eps
    plain = torch.optim.AdamW(theirs.trainable().values(), lr=1.0, betas=betas, eps=eps, weight_decay=decay)
    for step in range(STEPS):
        for model in (ours, theirs):
            for p, grad in zip(model.trainable().values(), gradients(step), strict=True):
                p.grad = grad.clone()
        norm = math.sqrt(sum(g.double().square().sum().item() for g in gradients(step)))
        if config.max_grad_norm is not None:
            for p in theirs.trainable().values():
                p.grad *= min(1.0, config.max_grad_norm / norm)
        plain.param_groups[0]["lr"] = config.lr * factor(config, step)
        plain.step()
        said = optimizer.step(step)
        assert float(said["grad_norm"]) == pytest.approx(norm, rel=1e-5), "the norm before the clip"
        assert said["lr"] == pytest.approx(config.lr * factor(config, step))
        assert all(p.grad is None for p in ours.trainable().values()), "a step begins without gradients"
        for p, want in zip(ours.trainable().values(), theirs.trainable().values(), strict=True):
            torch.testing.assert_close(p, want, rtol=1e-5, atol=1e-6)


def test_the_first_step_of_adamw_by_hand():
    """p <- p (1 - lr decay) - lr sign(g): the bias-corrected moments of one gradient are g and g^2."""
    model = Toy()
    start = {n: p.detach().clone() for n, p in model.trainable().items()}
    optimizer = Optimizer(model, OptimConfig(lr=0.1, weight_decay=0.5, max_grad_norm=None), 1)
    for p, grad in zip(model.trainable().values(), gradients(0), strict=True):
        p.grad = grad
    optimizer.step(0)
    for (name, p), grad in zip(model.trainable().items(), gradients(0), strict=True):
        torch.testing.assert_close(p.detach(), start[name] * 0.95 - 0.1 * grad.sign(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("what", ["nan", "inf", "loss"])
def test_a_step_that_is_no_number_changes_nothing(what):
    """The run with it equals the run without it, to the bit, moments and step counts and all."""
    runs = []
    for bad_at in (None, 2):
        model = Toy()
        optimizer = Optimizer(model, OptimConfig(lr=1e-2, weight_decay=0.1), STEPS)
        for step in range(5):
            if step == bad_at:
                for i, (p, grad) in enumerate(zip(model.trainable().values(), gradients(step), strict=True)):
                    p.grad = grad.clone()
                    if i == 0 and what != "loss":
                        p.grad.view(-1)[0] = float(what)
                loss = torch.tensor(math.nan if what == "loss" else 1.0)
                assert not math.isfinite(float(optimizer.step(step, loss)["grad_norm"]) + float(loss))
            for p, grad in zip(model.trainable().values(), gradients(step), strict=True):
                p.grad = grad.clone()
            optimizer.step(step, torch.tensor(1.0))
        runs.append((model.trainable(), optimizer.state()))
        assert optimizer.skipped.take() == (0 if bad_at is None else 1, 0)
        assert optimizer.skipped.take() == (0, 0)
    for before, after in zip(*runs, strict=True):
        assert before.keys() == after.keys()
        assert all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize(
    ("kind", "warmup", "want"),
    [
        ("constant", 0, [1, 1, 1, 1, 1]),
        ("constant", 4, [0.25, 0.5, 0.75, 1, 1]),
        ("linear", 0, [1, 0.8, 0.6, 0.4, 0.2]),
        ("linear", 2, [0.5, 1, 1, 2 / 3, 1 / 3]),
        ("cosine", 1, [1, 1, 0.5 + 0.5**1.5, 0.5, 0.5 - 0.5**1.5]),
    ],
)
def test_schedule(kind, warmup, want):
    config = OptimConfig(schedule=kind, warmup_steps=warmup)
    assert [schedule(config, step, 5) for step in range(5)] == pytest.approx(want)


def test_counts_of_left_out_updates_go_on_where_they_were_saved():
    first, second = Skipped(), Skipped()
    for bad in (1.0, 0.0, 1.0, 1.0):
        first.add(torch.tensor(bad))
    second.load_state(first.state())
    for one in (first, second):
        one.add(torch.tensor(1.0))
        assert one.take() == (4, 3)
    second.load_state({})  # of a checkpoint that has none
    assert second.take() == (0, 0)
