"""Students and teachers as self-distillation has them, gradients of a loss over them, and how far off these are."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import Divergence, Head, fused_token_kl
from opsd_kernels.reference import dense_token_kl
from opsd_kernels.rows import select_rows
from opsd_kernels.sweep import Operands, plan

DIVERGENCES = {
    "reverse_kl": Divergence("reverse_kl"),
    "forward_kl": Divergence("forward_kl", temperature=1.3),
    "jsd": Divergence("jsd", beta=0.3),
}
Results = dict[str, Tensor]  # value (N,), hidden (N, D), head (V, D)
Loss = Callable[..., Tensor]  # of student_hidden, head, teacher_hidden, teacher_head; (N,)


@dataclass(frozen=True)
class Inputs:
    student_hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    teacher_hidden: Tensor  # (N, D)
    teacher_head: Tensor | None  # (V, D); None: head
    upstream: Tensor  # (N,), a factor of each token's gradient

    def to(self, dtype: torch.dtype) -> Inputs:
        made = (None if x is None else x.to(dtype) for x in vars(self).values())
        return Inputs(*made)

    def double(self) -> Inputs:
        return self.to(torch.float64)

    def logits(self) -> tuple[Tensor, Tensor]:
        teacher_head = self.head if self.teacher_head is None else self.teacher_head
        return self.student_hidden @ self.head.mT, self.teacher_hidden @ teacher_head.mT


def mixture(dtype: torch.dtype, shared: bool, shape: tuple[int, int, int], device: str = "cpu") -> Inputs:
    """Heavy-tailed logits; teachers at distances that give divergences from 1e-4 to about 1. shape: N, V, D."""
    (n, vocab, width), g = shape, torch.Generator().manual_seed(11)
    head = torch.randn(vocab, width, generator=g) * torch.rand(vocab, 1, generator=g).pow(2) * (9.6 / width**0.5)
    student = torch.randn(n, width, generator=g)
    teacher = student + torch.logspace(-2.4, -0.8, n)[:, None] * torch.randn(n, width, generator=g)
    other = None if shared else (head * (1 + 1e-3 * torch.randn(vocab, width, generator=g))).to(device, dtype)
    upstream = (torch.rand(n, generator=g) + 0.5).to(device)
    return Inputs(*(x.to(device, dtype) for x in (student, head, teacher)), other, upstream)


def dense(divergence: Divergence) -> Loss:
    return lambda s, w, t, u: dense_token_kl(s, w, t, u, divergence)


def fused(divergence: Divergence, backend: str, workspace_mib: float = 512.0) -> Loss:
    return lambda s, w, t, u: fused_token_kl(
        s, w, t, u, divergence=divergence, backend=backend, workspace_mib=workspace_mib
    )


def differentiate(loss: Loss, inputs: Inputs, trainable: bool = True) -> Results:
    """Value, and the gradients of the values' sum, each times its upstream."""
    student = inputs.student_hidden.clone().requires_grad_()
    head = inputs.head.clone().requires_grad_(trainable)
    value = loss(student, head, inputs.teacher_hidden, inputs.teacher_head)
    (value * inputs.upstream.to(value.dtype)).sum().backward()
    assert student.grad is not None
    results = {"value": value.detach(), "hidden": student.grad}
    return results if head.grad is None else results | {"head": head.grad}


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative error, of the whole and of the median row."""
    difference, size = found.double() - truth, truth
    if truth.dim() == 1:
        difference, size = difference[:, None], truth[:, None]
    rows = difference.norm(dim=1) / size.norm(dim=1).clamp_min(1e-30)
    return {"whole": (difference.norm() / size.norm()).item(), "median row": rows.median().item()}


def workspace_for(inputs: Inputs, backend: str, tokens: int) -> float:
    """MiB with which so many tokens, or a few more, make a chunk."""
    rows, vocab = select_rows(backend, inputs.head.device), inputs.head.shape[0]
    teacher_head = inputs.head if inputs.teacher_head is None else inputs.teacher_head
    sides = inputs.student_hidden, Head(inputs.head), inputs.teacher_hidden, Head(teacher_head)
    step = 2 * vocab / 2**20  # a quarter of one token's logits
    budget = rows.scratch_bytes(vocab) / 2**20
    while True:
        budget += step
        try:
            chunks, _ = plan(Operands(*sides, Divergence(), rows, budget), with_grad=True)
        except ValueError:
            continue
        if chunks.rows >= min(tokens, len(inputs.student_hidden)):
            return budget
