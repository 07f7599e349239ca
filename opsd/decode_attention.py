"""Attention of one decoded token per slot, over rectangles of keys of which each row uses the first few.

    out_i, lse_i = attention of q_i (L, H, d) over the first lengths_i keys of row i, or over those its mask allows

`cpu_flash` and `dense` as in opsd.attention_kernels; `cuda_flash` is flash-attention's varlen kernel, which is told how
many keys a row uses and reads no others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opsd.attention_choice import Choice, choose_kernel
from opsd.attention_kernels import Kernel

_aten = torch.ops.aten


@dataclass
class Seen:
    """Which keys of its rectangle each row uses: made once a step, shared by the layers."""

    lengths: Tensor  # (n,) int64, of what counts without a mask
    used: int  # no row uses more keys
    mask: Tensor | None = None  # (n, L, used) bool where not the first `lengths` keys count, as under a window

    @cached_property
    def allowed(self) -> Tensor:
        """(n, L or 1, used) bool."""
        if self.mask is not None:
            return self.mask
        return torch.arange(self.used, device=self.lengths.device) < self.lengths[:, None, None]

    @cached_property
    def bias(self) -> Tensor:
        """(n, 1, L or 1, used) fp32, 0 or -inf."""
        return torch.zeros_like(self.allowed, dtype=torch.float32).masked_fill_(~self.allowed, -torch.inf)[:, None]

    @cached_property
    def nothing(self) -> Tensor:
        """(n, L, 1) bool: a window has left the whole rectangle behind."""
        return ~self.allowed.any(-1)[..., None]


def attend_rows(
    q: Tensor,  # (n, L, H, d)
    k: Tensor,  # (n, C, Hkv, d)
    v: Tensor,
    seen: Seen,
    scale: float,
    choice: Choice | Kernel = "auto",  # engine.attention
) -> tuple[Tensor, Tensor]:  # (n, L, H, d), (n, L, H) fp32
    """No gradient."""
    if seen.mask is None and choose_kernel(q, choice).ragged:
        return _cuda_flash(q, k, v, seen.lengths, scale)
    k, v = k[:, : seen.used], v[:, : seen.used]
    if q.device.type == "cpu" and choice != "dense":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *(x.transpose(1, 2) for x in (q, k, v)), 0.0, False, attn_mask=seen.bias.to(q.dtype), scale=scale
        )
        out, lse = out.transpose(1, 2), lse.transpose(1, 2)
    else:
        out, lse = _dense(q, k, v, seen.allowed, scale)
    if seen.mask is None:
        return out, lse
    # kernels differ on the lse of nothing
    return out.masked_fill(seen.nothing[..., None], 0.0), lse.masked_fill(seen.nothing, -torch.inf)


def _cuda_flash(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    (n, width), capacity = q.shape[:2], k.shape[1]
    rows = torch.arange(n + 1, device=q.device, dtype=torch.int32)
    out, lse, *_ = _aten._flash_attention_forward(
        q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), rows * width, rows * capacity, width, capacity, 0.0, False,
        False, scale=scale, seqused_k=lengths.to(torch.int32),
    )  # fmt: skip
    return out.unflatten(0, (n, width)), lse.transpose(0, 1).unflatten(0, (n, width))


def _dense(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Softmax in fp32; the queries of a key head are stacked, so keys are not copied per query head."""
    heads = k.shape[2]
    stacked = q.unflatten(2, (heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)  # (n, Hkv, group * L, d)
    scores = (stacked @ k.permute(0, 2, 3, 1)).float().unflatten(2, (-1, q.shape[1])) * scale
    scores = scores.masked_fill(~allowed[:, None, None], -torch.inf)
    lse = scores.logsumexp(-1)
    weights = torch.exp(scores - lse[..., None]).to(v.dtype).flatten(2, 3)
    out = (weights @ v.transpose(1, 2)).unflatten(2, (-1, q.shape[1]))
    return out.permute(0, 3, 1, 2, 4).flatten(2, 3), lse.permute(0, 3, 1, 2).flatten(2, 3)
