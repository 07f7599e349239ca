"""Logits in fp32, from exact products, of a head in the dtype of the hidden states.

So does the divergence form them (opsd_kernels/gemm.py): what is sampled, what is scored and what is trained is one
distribution, and the importance ratio of a response that was just sampled is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels import Head, gemm

_SCRATCH = 1 << 24  # fp32 elements of the block that a half head is widened into where no GEMM takes it as it is


def scratch_for(weight: Tensor) -> Tensor | None:
    """Room to widen the head in, block by block of the vocabulary; None where that is not needed."""
    if not gemm.needs_widening(weight):
        return None
    size, width = weight.shape
    return torch.empty(max(1, min(size, _SCRATCH // width)), width, device=weight.device)


def logits_of(
    hidden: Tensor,  # (n, D)
    head: Head | Tensor,  # weight (V, D)
    scratch: Tensor | None = None,
    out: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:  # (n, V) fp32
    """The head's logits, without a gradient. scratch, out: memory to use again. slope: its softcap's derivative."""
    head = Head.of(head).view().to(hidden.dtype)
    if out is None:
        out = torch.empty(len(hidden), len(head.weight), device=hidden.device)
    gemm.logits_into(out, hidden, head.weight, scratch if scratch is not None else scratch_for(head.weight))
    return finish(out, head, slope)


def finish(
    products: Tensor,  # (n, V) fp32: hidden weight^T, changed in place
    head: Head,
    slope: Tensor | None = None,
) -> Tensor:  # (n, V) fp32
    """What the head makes of its products: bias, scale, softcap. slope as above."""
    head.finish_(products, slope)
    return products if head.factor == 1.0 else products.mul_(head.factor)
