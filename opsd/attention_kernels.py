"""Attention of one part, forward and backward, with the log-sum-exp in the open. `attention_choice` picks one.

`cpu_flash`   torch's flash kernel for CPUs
`cuda_flash`  torch's flash-attention varlen kernels (fp16, bf16)
`dense`       the definition, in plain torch: any device and dtype; the twin the others are tested against
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from opsd.attention_plan import Part
from opsd.attention_rows import Ragged

_aten = torch.ops.aten


class Kernel(Protocol):
    name: str
    ragged: bool  # takes (tokens, heads, d) and offsets instead of (n, heads, L, d)

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype: ...

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]: ...

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]: ...


class CpuFlash:
    """Short runs of queries that share key heads go in as one run per key head: the kernel reads and packs the keys
    once for each of its blocks of queries, whose size grows with the length of the run."""

    name, ragged = "cpu_flash", False

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        mask, heads = _additive(part.mask, q.dtype), _heads_to_stack(q, k, part)
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            _stacked(q, heads), k, v, 0.0, part.causal, attn_mask=mask, scale=scale
        )
        return _unstacked(out, q), _unstacked(lse, q)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        mask, heads = _additive(part.mask, q.dtype), _heads_to_stack(q, k, part)
        grad, rows, out, lse = (_stacked(x, heads) for x in (grad, q, out, lse))
        dq, dk, dv = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, rows, k, v, out, lse, 0.0, part.causal, attn_mask=mask, scale=scale
        )
        return _unstacked(dq, q), dk, dv


class CudaFlash:
    """Ragged: one call for all spans of a kind."""

    name, ragged = "cuda_flash", True

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        out, lse, *_ = _aten._flash_attention_forward(
            q, k, v, *offsets(part), 0.0, part.causal, False, scale=scale, **_reach(part)
        )
        return out, lse.transpose(0, 1)  # (tokens, heads)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)  # state of a dropout that is off
        return _aten._flash_attention_backward(
            grad.contiguous(), q, k, v, out.contiguous(), lse.transpose(0, 1).contiguous(), *offsets(part), 0.0,
            part.causal, unused, unused, scale=scale, **_reach(part),
        )  # fmt: skip


class Dense:
    """S = scale Q K' (masked), lse = logsumexp S, P = exp(S - lse), out = P V; dS = P (dO V' - rowsum(dO out))."""

    name, ragged = "dense", False

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float64 if dtype == torch.float64 else torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        scores = self._scores(q, k, part, scale)
        lse = scores.logsumexp(-1)
        return self._grouped(torch.exp(scores - lse[..., None]), v).to(q.dtype), lse

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        wide = self.lse_dtype(q.dtype)
        grad, group = grad.to(wide), q.shape[1] // k.shape[1]
        p = torch.exp(self._scores(q, k, part, scale) - lse[..., None])
        dp = grad @ v.to(wide).repeat_interleave(group, 1).mT
        ds = p * (dp - (grad * out.to(wide)).sum(-1, keepdim=True)) * scale
        dq = self._grouped(ds, k)
        dk, dv = (x.unflatten(1, (-1, group)).sum(2) for x in (ds.mT @ q.to(wide), p.mT @ grad))
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)

    def _scores(self, q: Tensor, k: Tensor, part: Part, scale: float) -> Tensor:
        wide = self.lse_dtype(q.dtype)
        group = q.shape[1] // k.shape[1]
        scores = q.to(wide) @ k.to(wide).repeat_interleave(group, 1).mT * scale
        if part.causal:
            scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        return scores if part.mask is None else scores.masked_fill(~part.mask, -torch.inf)

    def _grouped(self, weights: Tensor, values: Tensor) -> Tensor:
        group = weights.shape[1] // values.shape[1]
        return weights @ values.to(weights.dtype).repeat_interleave(group, 1)


_LONGEST_BLOCK_FROM = 768  # queries; from here on torch's kernel has its largest blocks anyway


def _heads_to_stack(q: Tensor, k: Tensor, part: Part) -> int:
    """Heads of the keys, if the queries are few and no query of a head is treated unlike another; else of q."""
    alike = not part.causal and (part.mask is None or part.mask.shape[2] == 1)
    return k.shape[1] if alike and q.shape[2] < _LONGEST_BLOCK_FROM else q.shape[1]


def _stacked(x: Tensor, heads: int) -> Tensor:
    """(n, H, L, ...) -> (n, heads, H / heads * L, ...)"""
    return x if x.shape[1] == heads else x.unflatten(1, (heads, -1)).flatten(2, 3)


def _unstacked(x: Tensor, q: Tensor) -> Tensor:
    """Back to the heads of q."""
    return x if x.shape[1] == q.shape[1] else x.unflatten(2, (-1, q.shape[2])).flatten(1, 2)


CPU_FLASH, CUDA_FLASH, DENSE = CpuFlash(), CudaFlash(), Dense()


def _additive(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, -torch.inf)


def offsets(part: Part) -> tuple[Tensor, Tensor, int, int]:
    """Where the spans of queries and keys begin (int32), and the longest of each."""
    assert isinstance(part.queries, Ragged) and isinstance(part.keys, Ragged)
    return part.queries.offsets, part.keys.offsets, part.queries.width, part.keys.width


def _reach(part: Part) -> dict[str, int]:
    return {} if part.window is None else {"window_size_left": part.window - 1, "window_size_right": 0}
