"""log pi(y_t) of given tokens, never holding a [tokens, vocabulary] tensor."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def token_logprobs(
    hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    tokens: Tensor,  # (N,) int64
    workspace_mib: int = 256,
) -> Tensor:  # (N,) fp32
    """log softmax(hidden head^T)[tokens] in fp32, by chunks of rows whose logits are recomputed in the backward."""
    rows = max(1, workspace_mib * 2**20 // (4 * 3 * head.shape[0]))  # logits, their softmax, their gradient
    chunks = zip(hidden.split(rows), tokens.split(rows), strict=True)
    parts = [checkpoint(_chunk, h, head, t, use_reentrant=False) for h, t in chunks]
    return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def _chunk(hidden: Tensor, head: Tensor, tokens: Tensor) -> Tensor:
    logits = torch.nn.functional.linear(hidden.float(), head.float())  # never rounded to the hidden states' dtype
    return -torch.nn.functional.cross_entropy(logits, tokens, reduction="none")
