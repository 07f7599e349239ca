"""fused_token_kl for autograd, eagerly. compiled.py is the same for torch.compile."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_kernels.sweep import Gradients, Operands, sweep


class TokenKL(torch.autograd.Function):
    """Gradients of student_hidden, weight and bias, formed in the forward; backward multiplies by the arriving one."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N, D)
        weight: Tensor,  # (padded V, D)
        bias: Tensor | None,  # (padded V,)
        ops: Operands,
        weights: Tensor | None,  # (N,) fp32
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:  # weighted values, and all results
        wanted = [grad_enabled and needed for needed in ctx.needs_input_grad[:3]]
        ctx.hidden_grad = torch.empty_like(student_hidden) if wanted[0] else None
        ctx.weight_grad, ctx.bias_grad = (unfilled(x) if want else None for x, want in pairs(weight, bias, wanted))
        out = sweep(ops, weights, targets(ops, ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad))
        value = out["value"].clone() if weights is None else times(weights, out["value"])
        if any(wanted[1:]):
            ctx.ops, ctx.weights = ops, weights
            ctx.dtypes = weight.dtype, None if bias is None else bias.dtype
            # only a second sweep reads them, and raises if one has changed in place
            ctx.save_for_backward(student_hidden, weight, bias)
            ctx.versions = versions(weights, ops.teacher_hidden, ops.teacher_head.weight, ops.teacher_head.bias)
        ctx.mark_non_differentiable(out.table)
        return value, out.table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad = weight_grad = bias_grad = None
        if ctx.needs_input_grad[0]:
            hidden_grad = _hidden_gradient(ctx, upstream)
        if any(ctx.needs_input_grad[1:3]):
            weight_grad, bias_grad = _head_gradients(ctx, upstream)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def pairs(weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> list[tuple[Tensor, bool]]:
    return [(weight, wanted[1]), (weight if bias is None else bias, wanted[2])]


def times(weight: Tensor, x: Tensor, out: Tensor | None = None) -> Tensor:
    """weight * x in the dtype of x, where a weight of 0 outweighs x: a token that is left out may hold anything.

    out: where it goes, and may be x.
    """
    product = torch.mul(x, weight, out=torch.empty_like(x) if out is None else out)  # no wider copy of x on CUDA
    return product.masked_fill_(weight == 0, 0)


def unfilled(x: Tensor) -> Tensor:
    """Where the gradient of x goes: fp32, contiguous."""
    return torch.empty(x.shape, dtype=torch.float32, device=x.device)


def targets(ops: Operands, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Gradients:
    """Views of the gradients without the padded vocabulary. What a sweep does not fill is 0."""
    vocab = ops.head.weight.shape[0]
    filled = vocab if ops.student_hidden.shape[0] > 0 else 0
    for x in (weight, bias):
        if x is not None:
            x[filled:].zero_()
    return Gradients(hidden, None if weight is None else weight[:vocab], None if bias is None else bias[:vocab])


def _hidden_gradient(ctx: Any, upstream: Tensor) -> Tensor:  # (N,) -> (N, D)
    """In place where this is the only backward, so that the gradient is in memory once."""
    kept = ctx.hidden_grad
    if kept is None:
        raise RuntimeError("expected retain_graph=True in the backward before this one, got a second without it")
    if torch._C._autograd._get_current_graph_task_keep_graph():
        return times(upstream[:, None], kept)
    ctx.hidden_grad = None
    return times(upstream[:, None], kept, out=kept)


def _head_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:  # (N,) -> (V, D), (V,)
    kept = [ctx.weight_grad, ctx.bias_grad]
    ctx.weight_grad = ctx.bias_grad = None  # scaled in place, hence once
    first = any(x is not None for x in kept)
    if first and (upstream.numel() == 0 or is_uniform(upstream)):
        total = kept if changes_nothing(upstream) else [None if x is None else x.mul_(upstream[0]) for x in kept]
    else:
        kept.clear()  # before their successors are made
        total = _swept_again(ctx, upstream.float())
    return [None if x is None else x.to(dtype) for x, dtype in zip(total, ctx.dtypes, strict=True)]


def _swept_again(ctx: Any, upstream: Tensor) -> list[Tensor | None]:  # (N,) -> (V, D), (V,) fp32
    """Raises RuntimeError where an operand has changed in place since the forward: a teacher that moved, say."""
    _, weight, bias = ctx.saved_tensors
    if any(x._version != version for x, version in ctx.versions):
        raise RuntimeError("expected operands as they were in the forward, got a teacher or weights changed in place")
    weights = upstream if ctx.weights is None else upstream * ctx.weights
    total = [unfilled(x) if want else None for x, want in pairs(weight, bias, list(ctx.needs_input_grad[:3]))]
    sweep(ctx.ops, weights.contiguous(), targets(ctx.ops, None, *total))
    return total


def versions(*operands: Tensor | None) -> list[tuple[Tensor, int]]:
    """How often each has been written to. Tensors of torch.inference_mode do not count that."""
    return [(x, x._version) for x in operands if x is not None and not x.is_inference()]


def is_uniform(upstream: Tensor) -> bool:
    """One number for all tokens. Only the stride is asked on a device: reading values there would wait for it."""
    if upstream.numel() == 1 or upstream.stride(0) == 0:
        return True
    return on_host(upstream) and bool((upstream == upstream[0]).all())


def changes_nothing(upstream: Tensor) -> bool:
    """Of a uniform upstream: no tokens, or a 1, which spares a pass over the head's gradient."""
    return upstream.numel() == 0 or (on_host(upstream) and bool(upstream[0] == 1))


def on_host(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device."""
    return x.device.type == "cpu"
