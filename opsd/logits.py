"""Logits in fp32, from exact products, of a head in the dtype of the hidden states.

So does the divergence form them (opsd_kernels/gemm.py): what is sampled, what is scored and what is trained is one
distribution, and the importance ratio of a response that was just sampled is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd_kernels import gemm

_SCRATCH = 1 << 24  # fp32 elements of the block that a half head is widened into where no GEMM takes it as it is


def scratch_for(head: Tensor) -> Tensor | None:
    """Room to widen the head in, block by block of the vocabulary; None where that is not needed."""
    if not gemm.needs_widening(head):
        return None
    size, width = head.shape
    return torch.empty(max(1, min(size, _SCRATCH // width)), width, device=head.device)


def logits_of(
    hidden: Tensor,  # (n, D)
    head: Tensor,  # (V, D)
    scratch: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:  # (n, V) fp32
    """hidden @ head^T. scratch, out: memory to use again. No gradient."""
    head = head.to(hidden.dtype)
    if out is None:
        out = torch.empty(len(hidden), len(head), device=hidden.device)
    gemm.logits_into(out, hidden, head, scratch if scratch is not None else scratch_for(head))
    return out
