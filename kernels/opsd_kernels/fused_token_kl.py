"""`fused_token_kl`: two hidden-state matrices and a head in, one divergence per token out.

    z_s = student_hidden @ head.T            z_t = teacher_hidden @ (teacher_head or head).T        (N, V) each
    p = softmax(z_s / T)                     q = softmax(z_t / T), or at a temperature of the teacher's own
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
from opsd_kernels.heads import Head
from opsd_kernels.rows import RowOutputs, select_rows
from opsd_kernels.stats import TokenStats
from opsd_kernels.sweep import Gradients, Operands, sweep

DEFAULT_WORKSPACE_MIB = 1200  # 512 logits rows and 2048 gradient rows of a 152k vocabulary in bf16
Backend = Literal["auto", "triton", "native", "torch"]


@overload
def fused_token_kl(
    student_hidden: Tensor,
    head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | None = None,
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
    head: Tensor | Head,
    teacher_hidden: Tensor,
    teacher_head: Tensor | Head | None = None,
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
    head: Tensor | Head,  # (V, D) student head weight, same dtype
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Tensor | Head | None = None,  # (V, E); None: the student's head
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

    Heads. A tensor is a plain weight; Head (heads.py) adds a bias, a scale, a softcap, and padding to skip. Where both
    sides are the same linear function at the same temperature (teacher_head None, or a view of the same memory),
    (h_s - h_t) @ head.T is one product and an identical teacher gives exactly 0 and a zero gradient. A softcap, another
    scale, bias or temperature on one side separates them: then both logits are formed in fp32 and subtracted.
    With trainable shared heads only the student's side contributes to the gradients of weight and bias. The sides may
    differ in width and dtype.
    Half inputs: logits are fp32; on CPU, and for fp16 gradients, the head is widened blockwise in the workspace.

    Raises ValueError for dimensions, dtypes, devices or sizes that do not match, an invalid divergence, a workspace
    that cannot hold one row, or a named backend that is not available. N = 0 gives an empty result, zero gradients.
    """
    divergence = Divergence.of(divergence)
    student, teacher = Head.of(head), Head.of(head if teacher_head is None else teacher_head)
    check_operands(student_hidden, student, teacher_hidden, teacher, token_weights, tokens)
    ops = Operands(
        student_hidden=student_hidden,
        head=student.view(),
        teacher_hidden=teacher_hidden.detach(),
        teacher_head=teacher.view(),
        divergence=divergence,
        rows=select_rows(backend, student_hidden.device),
        workspace_mib=workspace_mib,
        tokens=None if tokens is None else tokens.contiguous(),
    )
    weights = None if token_weights is None else token_weights.detach().float().contiguous()
    value, table = TokenKL.apply(student_hidden, student.weight, student.bias, ops, weights, torch.is_grad_enabled())
    return (value, TokenStats.of(RowOutputs(table), tokens is not None)) if return_stats else value


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
        ctx.weight_grad, ctx.bias_grad = (_zeros(x) if want else None for x, want in _pairs(weight, bias, wanted))
        with torch.autocast(student_hidden.device.type, enabled=False):
            out = sweep(ops, weights, _targets(ops, ctx.hidden_grad, ctx.weight_grad, ctx.bias_grad))
        value = out["value"].clone() if weights is None else out["value"] * weights
        if any(wanted[1:]):  # only a second pass reads them
            ctx.ops, ctx.weights = ops, weights
            ctx.save_for_backward(student_hidden, weight, bias)  # raises if they change in place before that pass
        ctx.mark_non_differentiable(out.table)
        return value, out.table

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad = weight_grad = bias_grad = None
        if ctx.hidden_grad is not None:
            hidden_grad = (ctx.hidden_grad * upstream[:, None]).to(ctx.hidden_grad.dtype)
        if any(ctx.needs_input_grad[1:3]):
            weight_grad, bias_grad = _head_gradients(ctx, upstream)
        return hidden_grad, weight_grad, bias_grad, None, None, None


def _pairs(weight: Tensor, bias: Tensor | None, wanted: list[bool]) -> list[tuple[Tensor, bool]]:
    return [(weight, wanted[1]), (weight if bias is None else bias, wanted[2])]


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros_like(x, dtype=torch.float32)


def _targets(ops: Operands, hidden: Tensor | None, weight: Tensor | None, bias: Tensor | None) -> Gradients:
    """Views of the gradients without the padded vocabulary, whose gradient stays 0."""
    vocab = ops.head.weight.shape[0]
    return Gradients(hidden, None if weight is None else weight[:vocab], None if bias is None else bias[:vocab])


def _head_gradients(ctx: Any, upstream: Tensor) -> list[Tensor | None]:  # (N,) -> (V, D), (V,)
    student_hidden, weight, bias = ctx.saved_tensors
    kept = [ctx.weight_grad, ctx.bias_grad]
    ctx.weight_grad = ctx.bias_grad = None  # scaled in place, hence once
    first = any(x is not None for x in kept)
    if first and (upstream.numel() == 0 or _is_uniform(upstream)):
        total = kept if upstream.numel() == 0 else [None if x is None else x.mul_(upstream[0]) for x in kept]
    else:
        weights = upstream.float() if ctx.weights is None else upstream.float() * ctx.weights
        kept.clear()  # before their successors are made
        total = [_zeros(x) if want else None for x, want in _pairs(weight, bias, list(ctx.needs_input_grad[:3]))]
        with torch.autocast(student_hidden.device.type, enabled=False):
            sweep(ctx.ops, weights.contiguous(), _targets(ctx.ops, None, *total))
    return [None if x is None else x.to(like.dtype) for x, like in zip(total, (weight, bias), strict=True)]


def _is_uniform(upstream: Tensor) -> bool:
    """One number for all tokens. Only the stride is asked on a device: reading values there would wait for it."""
    if upstream.numel() == 1 or upstream.stride(0) == 0:
        return True
    return upstream.device.type == "cpu" and bool((upstream == upstream[0]).all())
