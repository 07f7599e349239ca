"""What computes in kernels of its own, with its shapes alone: attention over a packed row, and the loss.

Everything else of a rehearsed step is the code of the step itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.attention_plan import Part
from opsd.plan.ledger import Ledger
from opsd.plan.names import HEAD, INPUTS
from opsd_kernels.chunking import MIB, ChunkCosts, plan_chunks
from opsd_kernels.sweep import SCRATCH_SHARE


class AttentionShapes:
    """A flash kernel's results without computing them. ragged: as on CUDA, in fp16 and bf16."""

    name = "shapes"

    def __init__(self, ragged: bool):
        self.ragged = ragged

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        return torch.empty_like(q), q.new_empty(q.shape[:-1], dtype=torch.float32)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.ragged:  # flash-attention sums dq in fp32 and dk, dv per query head
            _sums = q.new_empty(q.shape, dtype=torch.float32)
            _expanded = [q.new_empty(k.shape[0], *q.shape[1:]) for _ in range(2)] if k.shape[1] < q.shape[1] else []
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class StepShapes:
    """What a decode step carries to the attention layers (opsd.decode.StepKV): its keys are written where they lie."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        return torch.empty_like(q.transpose(0, 1))


class LossShapes(torch.autograd.Function):
    """opsd_kernels.autograd.TokenKL: a workspace, then gradients that wait for the backward; a second one sweeps again
    for that of the head."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, workspace: int, ledger: Ledger) -> Tensor:
        ctx.hidden_grad = torch.empty_like(hidden)
        ctx.head, ctx.workspace, ctx.ledger = head, workspace, ledger
        ctx.weight_grad = _swept(head, workspace, ledger, ctx.needs_input_grad[1])
        return hidden.new_empty(len(hidden), dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        wanted = ctx.needs_input_grad[1]
        weight_grad, ctx.weight_grad = ctx.weight_grad, None
        if wanted and weight_grad is None:
            weight_grad = _swept(ctx.head, ctx.workspace, ctx.ledger, wanted)
        hidden_grad = torch.empty_like(ctx.hidden_grad)
        return hidden_grad, None if weight_grad is None else weight_grad.to(ctx.head.dtype), None, None


def _swept(head: Tensor, workspace: int, ledger: Ledger, wanted: bool) -> Tensor | None:
    """The head's gradient, after a sweep in a workspace that is gone."""
    weight_grad = head.new_empty(head.shape, dtype=torch.float32) if wanted else None
    with ledger.under(HEAD):
        head.new_empty(workspace, dtype=torch.uint8)
    return weight_grad


class HostShapes:
    """A lane of opsd.offload to pinned memory, of which torch's allocator gives powers of two."""

    def __init__(self, ledger: Ledger):
        self.ledger = ledger

    def out(self, x: Tensor) -> tuple[Tensor, None]:
        with self.ledger.under(INPUTS):
            room = torch.empty(1 << (x.nbytes - 1).bit_length(), dtype=torch.uint8, device="meta")
        return room[: x.nbytes].view(x.dtype).view(x.shape), None

    def back(self, kept: Tensor) -> tuple[Tensor, None]:
        return torch.empty_like(kept), None

    def wait(self, done: None) -> None: ...


def workspace_bytes(tokens: int, head: Tensor, budget_mib: int, cuda: bool) -> int:
    """What fused_token_kl allocates for a model's own head (V, D): opsd_kernels.sweep.plan, for either device."""
    vocab, width = head.shape
    half_rows = cuda and head.dtype == torch.bfloat16
    widens = head.dtype != torch.float32 and not half_rows
    room = budget_mib * MIB // SCRATCH_SHARE // 4 // width * width
    costs = ChunkCosts(
        fixed=4 * min(room, head.numel()) if widens else 0,
        row=4 * (2 * vocab + 4 * width),
        grad_row=2 * vocab if half_rows else 0,
    )
    return plan_chunks(tokens, costs, budget_mib, collect=head.requires_grad).bytes(costs)
