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

from typing import Literal, overload

import torch
from torch import Tensor

from opsd_kernels.autograd import TokenKL
from opsd_kernels.checks import check_divergence, check_finite_rows, check_operands, check_workspace
from opsd_kernels.compiled import Settings, token_kl
from opsd_kernels.divergence import Divergence
from opsd_kernels.heads import Head
from opsd_kernels.rows import RowOutputs, row_kernel
from opsd_kernels.scalars import check_flag
from opsd_kernels.stats import TokenStats
from opsd_kernels.sweep import Operands

DEFAULT_WORKSPACE_MIB = 1228  # 1.2 GiB: 512 logits and 2048 gradient rows of a 152k vocabulary and width 4096 in bf16
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
    check_finite: bool = ...,
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
    check_finite: bool = ...,
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
    check_finite: bool = False,
) -> Tensor | tuple[Tensor, TokenStats]:  # (N,) fp32
    """token_weights * divergence of each token, differentiable in student_hidden and head; equations on this page.

    divergence: a Divergence, or its kind as a str. With a support (TopK) it is an approximation.
    token_weights: constants that multiply both value and gradient (None: ones); 0 leaves a token out, and so does
    False in a bool mask, without waiting for the device.
    workspace_mib: budget for everything beside inputs, results and the gradients handed back. On a CPU under Linux it
    stays for the next call (memory.py).
    backend: row kernel; "auto" is triton on CUDA, native C++ on CPU, torch where those are missing (logged once).
    return_stats: also return TokenStats (stats.py), from the same pass.
    tokens: the sampled tokens, whose log-probabilities under both sides TokenStats then holds.

    Upstream gradients. A frozen head (requires_grad False) is exact for any per-token gradient without recompute.
    A trainable head needs the upstream to be one number for all tokens, as `.sum()` hands back: put masks and
    1/length into token_weights and divide the sum, not the tokens. Any other upstream is correct too, at 3 G more for
    a second pass in backward, and so is a second backward through a retained graph; without retain_graph gradients are
    scaled in place, and a second backward raises. Uniform is recognised by stride 0 (and on CPU by value). Double
    backward raises.
    Under torch.compile the call is one node, opsd::fused_token_kl; autocast does not touch it. Beside a trained head
    its operands must then be none of torch.inference_mode, which autograd does not keep: ValueError.

    Heads. A tensor is a plain weight; Head (heads.py) adds a bias, a scale, a softcap, and padding to skip. Where both
    sides are the same linear function at the same temperature (teacher_head None, or a view of the same memory),
    (h_s - h_t) @ head.T is one product and an identical teacher gives exactly 0 and a zero gradient. A softcap, another
    scale, bias or temperature on one side separates them: then both logits are formed in fp32 and subtracted.
    With trainable shared heads only the student's side contributes to the gradients of weight and bias. The sides may
    differ in width and dtype.
    Half inputs: logits are fp32; on CPU, and for fp16 gradients, the head is widened blockwise in the workspace.

    A head in slices (Head.shard): each rank of the group calls with its rows and with the same of everything else. It
    gets the results of the whole head, the whole hidden gradient (summed over the ranks here: no reduction is left to
    do) and the gradients of its own rows. Tokens and valid_vocab count over the whole head. Reductions run in torch
    rows, five collectives per slab of tokens. A head that FSDP2 or ZeRO-3 keeps in shards: gather.py makes it whole.
    A teacher elsewhere: where teacher_head is on another device, its products run there, chunk by chunk, and its
    logits are copied to the student's; teacher_hidden may be on either.

    Infinite logits. A column that is -inf on both sides counts nothing. Where only the teacher excludes a token,
    reverse KL is +inf and has no gradient (its row, and a trainable head's sum, are NaN); with a clip, or as JSD, both
    are finite. Where only the student does, forward KL is +inf. No other token's value or hidden gradient is touched,
    and a token of weight 0 gives 0 whatever its logits are. check_finite looks for NaN and infinity in the hidden
    states first; it waits for the device and is for eager calls.

    Raises ValueError for types, dimensions, dtypes, devices or sizes that do not match, an invalid divergence, hidden
    states that check_finite finds, a workspace that cannot hold one row, or a named backend that is not available; and
    RuntimeError in a second pass whose operands have changed in place (what is written through `.data` is not seen).
    N = 0 gives an empty result, zero gradients.
    """
    divergence = Divergence.of(divergence)
    student, teacher = Head.of(head), Head.of(head if teacher_head is None else teacher_head)
    check_operands(student_hidden, student, teacher_hidden, teacher, token_weights, tokens)
    check_divergence(divergence, student, teacher)
    check_workspace(workspace_mib)
    check_flag("return_stats", return_stats)
    check_flag("check_finite", check_finite)
    if check_finite and torch.compiler.is_compiling():
        raise ValueError("expected check_finite=False under torch.compile (it reads values on the host), got True")
    if check_finite:
        check_finite_rows(student_hidden=student_hidden, teacher_hidden=teacher_hidden)
    weights = None if token_weights is None else token_weights.detach().float().contiguous()
    if torch.compiler.is_compiling():
        settings = Settings.of(divergence, student, teacher, backend, workspace_mib)
        value, table = token_kl(student_hidden, student, teacher_hidden, teacher, weights, tokens, settings)
        return (value, TokenStats.of(RowOutputs(table), tokens is not None)) if return_stats else value
    view = student.view()
    ops = Operands(
        student_hidden=student_hidden,
        head=view,
        teacher_hidden=teacher_hidden.detach(),
        teacher_head=teacher.view(),
        divergence=divergence,
        rows=row_kernel(backend, student_hidden.device, divergence, view.shard, workspace_mib),
        workspace_mib=workspace_mib,
        tokens=None if tokens is None else tokens.contiguous(),
    )
    value, table = TokenKL.apply(student_hidden, student.weight, student.bias, ops, weights, torch.is_grad_enabled())
    return (value, TokenStats.of(RowOutputs(table), tokens is not None)) if return_stats else value
