"""`fused_token_kl`: two hidden-state matrices and a head in, one divergence per token out.

    z_s = student_hidden @ head.T            z_t = teacher_hidden @ (teacher_head or head).T        (N, V) each
    p = softmax(z_s / T)                     q = softmax(z_t / T)
    reverse_kl  D = sum_v p (ln p - ln q)
    forward_kl  D = sum_v q (ln q - ln p)
    jsd         D = b KL(q||M) + (1-b) KL(p||M),   M = (1-b) p + b q
    result_n = w_n D_n,   d result_n / d z_s = w_n g_n / T  (divergence.py has g),   nothing flows to the teacher

Neither z_s, z_t nor their gradients exist for all tokens: chunks of tokens that keep the whole vocabulary pass through
one reused workspace (chunking.py, sweep.py), and the gradient is formed in the forward. With G = one head GEMM of
2 N D V operations, a frozen head takes 3 G and a trainable one 4 G.
"""

from typing import Any, Literal, overload

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from opsd_kernels.checks import check_operands
from opsd_kernels.divergence import Divergence
from opsd_kernels.rows import RowOutputs, select_rows
from opsd_kernels.stats import TokenStats
from opsd_kernels.sweep import Operands, sweep

DEFAULT_WORKSPACE_MIB = 1200  # 512 logits rows and 2048 gradient rows of a 152k vocabulary in bf16
Backend = Literal["auto", "triton", "native", "torch"]


@overload
def fused_token_kl(
    student_hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None = None,
    *,
    divergence: Divergence | str = ...,
    token_weights: Tensor | None = ...,
    tokens: Tensor | None = ...,
    workspace_mib: float = ...,
    backend: Backend = ...,
    return_stats: Literal[False] = False,
) -> Tensor: ...
@overload
def fused_token_kl(
    student_hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None = None,
    *,
    divergence: Divergence | str = ...,
    token_weights: Tensor | None = ...,
    tokens: Tensor | None = ...,
    workspace_mib: float = ...,
    backend: Backend = ...,
    return_stats: Literal[True],
) -> tuple[Tensor, TokenStats]: ...
def fused_token_kl(
    student_hidden: Tensor,  # (N, D) fp32 | fp16 | bf16
    head: Tensor,  # (V, D) student head weight, same dtype
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Tensor | None = None,  # (V, E); None or the very same tensor: the student's head
    *,
    divergence: Divergence | str = "reverse_kl",
    token_weights: Tensor | None = None,  # (N,)
    tokens: Tensor | None = None,  # (N,) int64
    workspace_mib: float = DEFAULT_WORKSPACE_MIB,
    backend: Backend = "auto",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:  # (N,) fp32
    """token_weights * divergence of each token, differentiable in student_hidden and head; equations on this page.

    divergence: a Divergence, or its kind as a str.
    token_weights: constants that multiply both value and gradient (None: ones); 0 leaves a token out.
    workspace_mib: budget for everything beside inputs, results and the gradients handed back.
    backend: row kernel; "auto" is triton on CUDA, native C++ on CPU, torch where those are missing (logged once).
    return_stats: also return TokenStats (stats.py), from the same pass.
    tokens: the sampled tokens, whose log-probabilities under both sides TokenStats then holds.

    Upstream gradients. A frozen head (requires_grad False) is exact for any per-token gradient without recompute.
    A trainable head needs the upstream to be one number for all tokens, as `.sum()` hands back: put masks and
    1/length into token_weights and divide the sum, not the tokens. Any other upstream is correct too, at 3 G more for
    a second pass in backward, and so is a second backward through a retained graph. Uniform is recognised by stride 0
    (and on CPU by value). Double backward raises.

    A shared head takes (h_s - h_t) @ head.T as one product, so an identical teacher gives exactly 0 and a zero
    gradient; with trainable shared heads only the student's side contributes to the head's gradient.
    Half inputs: logits are fp32; on CPU, and for fp16 gradients, the head is widened blockwise in the workspace.

    Raises ValueError for dimensions, dtypes, devices or sizes that do not match, an invalid divergence, a workspace
    that cannot hold one row, or a named backend that is not available. N = 0 gives an empty result, zero gradients.
    """
    divergence = Divergence.of(divergence)
    check_operands(student_hidden, head, teacher_hidden, teacher_head, token_weights, tokens)
    ops = Operands(
        student_hidden=student_hidden,
        head=head,
        teacher_hidden=teacher_hidden.detach(),
        teacher_head=None if _is_shared(head, teacher_head) else teacher_head.detach(),  # type: ignore[union-attr]
        divergence=divergence,
        rows=select_rows(backend, student_hidden.device),
        workspace_mib=workspace_mib,
        tokens=None if tokens is None else tokens.contiguous(),
    )
    weights = None if token_weights is None else token_weights.detach().float().contiguous()
    value, table = TokenKL.apply(student_hidden, head, ops, weights, torch.is_grad_enabled())
    return (value, TokenStats.of(RowOutputs(table), tokens is not None)) if return_stats else value


def _is_shared(head: Tensor, teacher_head: Tensor | None) -> bool:
    """None, the same tensor, or another view (a detached one, say) of the same memory."""
    if teacher_head is None or teacher_head is head:
        return True
    same_layout = (head.shape, head.stride(), head.dtype) == (
        teacher_head.shape,
        teacher_head.stride(),
        teacher_head.dtype,
    )
    return same_layout and head.data_ptr() == teacher_head.data_ptr()


class TokenKL(torch.autograd.Function):
    """Gradients of student_hidden and head, formed in the forward; backward multiplies by the arriving gradient."""

    @staticmethod
    def forward(
        ctx: Any,
        student_hidden: Tensor,  # (N, D)
        head: Tensor,  # (V, D)
        ops: Operands,
        weights: Tensor | None,  # (N,) fp32
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:  # weighted values, and all results
        needs_hidden = grad_enabled and ctx.needs_input_grad[0]
        needs_head = grad_enabled and ctx.needs_input_grad[1]
        hidden_grad = torch.empty_like(student_hidden) if needs_hidden else None
        head_grad = torch.zeros_like(head, dtype=torch.float32) if needs_head else None
        with torch.autocast(student_hidden.device.type, enabled=False):
            out = sweep(ops, weights, hidden_grad, head_grad)
        value = out["value"].clone() if weights is None else out["value"] * weights
        ctx.hidden_grad, ctx.head_grad = hidden_grad, head_grad
        if needs_head:  # only a second pass reads them
            ctx.ops, ctx.weights = ops, weights
            ctx.save_for_backward(student_hidden, head)  # raises if they change in place before that pass
        ctx.mark_non_differentiable(out.table)
        return value, out.table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad = head_grad = None
        if ctx.hidden_grad is not None:
            hidden_grad = (ctx.hidden_grad * upstream[:, None]).to(ctx.hidden_grad.dtype)
        if ctx.needs_input_grad[1]:
            head_grad = _head_gradient(ctx, upstream)
        return hidden_grad, head_grad, None, None, None


def _head_gradient(ctx: Any, upstream: Tensor) -> Tensor:  # (N,) -> (V, D)
    student_hidden, head = ctx.saved_tensors
    kept, ctx.head_grad = ctx.head_grad, None  # scaled in place, hence once
    if kept is not None and upstream.numel() == 0:
        return kept.to(head.dtype)
    if kept is not None and _is_uniform(upstream):
        return kept.mul_(upstream[0]).to(head.dtype)
    weights = upstream.float() if ctx.weights is None else upstream.float() * ctx.weights
    total = torch.zeros_like(head, dtype=torch.float32) if kept is None else kept.zero_()
    with torch.autocast(student_hidden.device.type, enabled=False):
        sweep(ctx.ops, weights.contiguous(), None, total)
    return total.to(head.dtype)


def _is_uniform(upstream: Tensor) -> bool:
    """One number for all tokens. Only the stride is asked on a device: reading values there would wait for it."""
    if upstream.numel() == 1 or upstream.stride(0) == 0:
        return True
    return upstream.device.type == "cpu" and bool((upstream == upstream[0]).all())
