"""log pi(y_t) of given tokens, never holding a [tokens, vocabulary] tensor, nor a second head for each chunk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.logits import logits_of, scratch_for
from opsd_kernels import gemm


def token_logprobs(
    hidden: Tensor,  # (N, D)
    head: Tensor,  # (V, D)
    tokens: Tensor,  # (N,) int64
    workspace_mib: int = 256,
) -> Tensor:  # (N,) fp32
    """log softmax(hidden head^T)[tokens] in fp32, by chunks of rows whose logits are formed again in the backward.

    The head is taken in the dtype of the hidden states. On CUDA the gradient of bf16 logits is bf16, its sums are fp32.
    """
    rows = max(1, workspace_mib * 2**20 // (4 * 3 * head.shape[0]))  # logits, their exponentials, their gradient
    return _TokenLogprobs.apply(hidden, head.to(hidden.dtype), tokens, rows)


class _TokenLogprobs(torch.autograd.Function):
    """l = z[y] - logsumexp z,   dl/dz = onehot(y) - softmax z."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, tokens: Tensor, rows: int) -> Tensor:
        log_sum = torch.empty(len(hidden), device=hidden.device)
        chosen = torch.empty_like(log_sum)
        for chunk, logits in _chunks(hidden, head, rows):
            log_sum[chunk] = logits.logsumexp(-1)
            chosen[chunk] = logits.gather(1, tokens[chunk, None])[:, 0]
        ctx.save_for_backward(hidden, head, tokens, log_sum)
        ctx.rows = rows
        return chosen - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, tokens, log_sum = ctx.saved_tensors
        hidden_grad, scratch = torch.empty_like(hidden), scratch_for(head)
        head_grad = torch.zeros(head.shape, device=head.device) if ctx.needs_input_grad[1] else None
        for chunk, logits in _chunks(hidden, head, ctx.rows):
            weight = upstream[chunk, None].float()
            grad = logits.sub_(log_sum[chunk, None]).exp_().mul_(-weight).scatter_add_(1, tokens[chunk, None], weight)
            grad = grad.to(gemm.gradient_dtype(head))
            hidden_grad[chunk] = gemm.hidden_gradient(grad, head, scratch).to(hidden.dtype)
            if head_grad is not None:
                gemm.head_gradient_into(head_grad, grad, hidden[chunk], add=True)
        return hidden_grad, None if head_grad is None else head_grad.to(head.dtype), None, None


def _chunks(hidden: Tensor, head: Tensor, rows: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows, and the logits of each in memory that the next one uses again."""
    memory = torch.empty(min(rows, len(hidden)), len(head), device=hidden.device)
    scratch = scratch_for(head)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, min(start + rows, len(hidden)))
        yield chunk, logits_of(hidden[chunk], head, scratch, memory[: chunk.stop - start])
