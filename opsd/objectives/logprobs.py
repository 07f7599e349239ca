"""log pi(y_t) of given tokens, never holding a [tokens, vocabulary] tensor, nor a second head for each chunk."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd.logits import logits_of, scratch_for
from opsd_kernels import Head, gemm


def token_logprobs(
    hidden: Tensor,  # (N, D)
    head: Head | Tensor,  # weight (V, D)
    tokens: Tensor,  # (N,) int64
    workspace_mib: int = 256,
) -> Tensor:  # (N,) fp32
    """log softmax(head(hidden))[tokens] in fp32, by chunks of rows whose logits are formed again in the backward.

    The head is taken in the dtype of the hidden states. On CUDA the gradient of bf16 logits is bf16, its sums are fp32.
    """
    head = Head.of(head).to(hidden.dtype)
    buffers = 3 if head.softcap is None else 4  # logits, their exponentials, their gradient, the slope of the cap
    rows = max(1, workspace_mib * 2**20 // (4 * buffers * len(head.weight)))
    return _TokenLogprobs.apply(hidden, head.weight, head.bias, tokens, head, rows)


class _TokenLogprobs(torch.autograd.Function):
    """l = z[y] - logsumexp z,  dl/dz = onehot(y) - softmax z;   z = c tanh(s x / c), x = W h + b,  dz/dx = s slope."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, tokens: Tensor, head: Head, rows: int
    ) -> Tensor:
        log_sum = torch.empty(len(hidden), device=hidden.device)
        chosen = torch.empty_like(log_sum)
        for chunk, logits, _ in _chunks(hidden, replace(head, weight=weight, bias=bias), rows):
            log_sum[chunk] = logits.logsumexp(-1)
            chosen[chunk] = logits.gather(1, tokens[chunk, None])[:, 0]
        ctx.save_for_backward(hidden, weight, bias, tokens, log_sum)
        ctx.scale, ctx.softcap, ctx.rows = head.scale, head.softcap, rows
        return chosen - log_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, tokens, log_sum = ctx.saved_tensors
        hidden_grad, scratch = torch.empty_like(hidden), scratch_for(weight)
        weight_grad, bias_grad = (
            torch.zeros(x.shape, device=x.device) if needed else None
            for x, needed in zip((weight, bias), ctx.needs_input_grad[1:3], strict=True)
        )
        head = Head(weight, bias, ctx.scale, ctx.softcap)
        for chunk, logits, slope in _chunks(hidden, head, ctx.rows, slopes=True):
            sent = upstream[chunk, None].float() * head.scale
            grad = logits.sub_(log_sum[chunk, None]).exp_().mul_(-sent).scatter_add_(1, tokens[chunk, None], sent)
            grad = (grad if slope is None else grad.mul_(slope)).to(gemm.gradient_dtype(weight))
            hidden_grad[chunk] = gemm.hidden_gradient(grad, weight, scratch).to(hidden.dtype)
            if weight_grad is not None:
                gemm.head_gradient_into(weight_grad, grad, hidden[chunk], add=True)
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=torch.float32)
        grads = (None if g is None else g.to(weight.dtype) for g in (weight_grad, bias_grad))
        return hidden_grad, *grads, None, None, None


def _chunks(
    hidden: Tensor, head: Head, rows: int, slopes: bool = False
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Slices of the rows, their logits and (asked) the slopes of a softcap, in memory that the next slice reuses."""
    memory = torch.empty(min(rows, len(hidden)), len(head.weight), device=hidden.device)
    slope = torch.empty_like(memory) if slopes and head.softcap is not None else None
    scratch = scratch_for(head.weight)
    for start in range(0, len(hidden), rows):
        chunk = slice(start, min(start + rows, len(hidden)))
        size = chunk.stop - start
        of_chunk = None if slope is None else slope[:size]
        yield chunk, logits_of(hidden[chunk], head, scratch, memory[:size], of_chunk), of_chunk
