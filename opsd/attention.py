"""Attention over a packed row: one function for rollout, teacher and student, registered with transformers.

A child attends to its root and to itself. Both parts are computed apart, each without a mask, and merged by their
log-sum-exps, so a root's keys are read once for all its children and never copied per child:

    out = sum_i w_i out_i,   w_i = exp(lse_i - lse),   lse = log sum_i exp(lse_i)

The backward of each part takes the merged out and lse: with P = exp(QK' - lse) and D = rowsum(dO * out) the usual
formulas dS = P * (dO V' - D) are then those of the whole softmax, so the gradients are exact sums over the parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from opsd import autocast
from opsd.attention_choice import Choice, choose_kernel
from opsd.attention_kernels import Kernel
from opsd.attention_plan import Plan, plan
from opsd.attention_rows import Joined
from opsd.packing import Packed
from opsd.prefix_entry import Stored

NAME = "opsd_packed"


class Carried(Protocol):
    """What a forward pass hands every attention layer beside the hidden states: PackedKV, or a decode step's."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor: ...


@dataclass
class PackedKV:
    """The layout of a packed row, keys of earlier passes, and room for those of this one."""

    packed: Packed
    stored: Sequence[Stored] = ()  # roots of earlier passes, in the order of the row
    keep: bool = False  # leave this row's keys and values in `kept`
    attention: Choice | Kernel = "auto"

    def __post_init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}
        self._plans: dict[tuple[Any, ...], Plan] = {}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q (H, S, d), k and v (Hkv, S, d) -> (S, H, d), differentiable in all three."""
        if self.keep:
            self.kept[layer] = k, v
        kernel = choose_kernel(q, self.attention)
        q, k, v = (x.transpose(0, 1) for x in (q, k, v))  # tokens first, as they lie in memory
        older = [(one.keys[layer].transpose(0, 1), one.values[layer].transpose(0, 1)) for one in self.stored]
        return _PackedAttention.apply(q, k, v, older, self.plan(window, kernel, q.device), kernel, scale)

    def plan(self, window: int | None, kernel: Kernel, device: torch.device) -> Plan:
        """The parts of a layer with this window; layers with the same window share them."""
        longest = max((tree.root + max(tree.children, default=0) for tree in self.packed.trees), default=0)
        key = (None if window is None or window >= longest else window, kernel.ragged, device)
        if key not in self._plans:
            self._plans[key] = plan(self.packed, key[0], kernel.ragged, device)
        return self._plans[key]


def packed_attention(
    module: Any,
    query: Tensor,  # (1, H, S, d)
    key: Tensor,  # (1, Hkv, S, d)
    value: Tensor,  # (1, Hkv, S, d)
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    packed: Carried | None = None,
    **options: Any,
) -> tuple[Tensor, None]:  # (1, S, H, d)
    """transformers' attention interface. A forward that carries no packed row takes the library's own SDPA."""
    if packed is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scaling, **options)
    dtype = autocast.dtype_on(query.device)
    if dtype is not None:  # norms of q and k leave autocast in fp32; SDPA would cast them
        query, key, value = query.to(dtype), key.to(dtype), value.to(dtype)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    out = packed.attend(module.layer_idx, query[0], key[0], value[0], scale, sliding_window)
    return out[None], None


class _PackedAttention(torch.autograd.Function):
    """older: keys and values (P, Hkv, d) of stored roots, which stand behind those of the row and get no gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        older: Sequence[tuple[Tensor, Tensor]],
        parts: Plan,
        kernel: Kernel,
        scale: float,
    ) -> Tensor:
        out, lse = attend(q, *_joined(k, v, older), parts, kernel, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.older, ctx.parts, ctx.kernel, ctx.scale = older, parts, kernel, scale
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, own_k, own_v, out, lse = ctx.saved_tensors
        k, v = _joined(own_k, own_v, ctx.older)
        dq, dk, dv = torch.zeros_like(q), k.zeros(), v.zeros()
        for part in ctx.parts:
            rows, keys = part.queries, part.keys
            found = ctx.kernel.backward(
                rows.take_grad(grad), rows.take(q), keys.take(k), keys.take(v), rows.take(out), rows.take(lse), part,
                ctx.scale,
            )  # fmt: skip
            rows.add(dq, found[0])
            keys.add(dk, found[1])
            keys.add(dv, found[2])
        return dq, dk[: len(own_k)], dv[: len(own_v)], None, None, None, None


def _joined(k: Tensor, v: Tensor, older: Sequence[tuple[Tensor, Tensor]]) -> tuple[Joined, Joined]:
    return Joined([k, *(keys for keys, _ in older)]), Joined([v, *(values for _, values in older)])


def attend(
    q: Tensor,  # (S, H, d)
    k: Joined,  # (S + stored, Hkv, d)
    v: Joined,
    parts: Plan,
    kernel: Kernel,
    scale: float,
) -> tuple[Tensor, Tensor]:  # (S, H, d), (S, H)
    """The forward: every query lies in one first part, and perhaps in one that is merged into it."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty(q.shape[:2], dtype=kernel.lse_dtype(q.dtype), device=q.device)
    for part in parts:
        rows = part.queries
        found, found_lse = kernel.forward(rows.take(q), part.keys.take(k), part.keys.take(v), part, scale)
        if part.merged:
            found, found_lse = merge(rows.take(out), rows.take(lse), found, found_lse)
        out, lse = rows.put(out, found), rows.put(lse, found_lse)
    return out, lse


def merge(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax over the union of two sets of keys, from the softmax over each."""
    share = torch.sigmoid(other_lse - lse)[..., None]
    merged = torch.lerp(out.to(share.dtype), other.to(share.dtype), share)
    return merged.to(out.dtype), torch.logaddexp(lse, other_lse)


def register() -> None:
    """Make the name known to transformers; masks for ordinary forwards are those of its SDPA."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(NAME, packed_attention)
    AttentionMaskInterface.register(NAME, sdpa_mask)
