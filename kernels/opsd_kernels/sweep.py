"""One pass over all tokens in chunks: logits, row kernel, gradient GEMMs. The only place where [rows, V] exists."""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import gemm
from opsd_kernels.chunking import ChunkCosts, ChunkPlan, plan_chunks
from opsd_kernels.divergence import Divergence
from opsd_kernels.rows import RESULTS, RowKernel, RowOutputs

SCRATCH_SHARE = 8  # one part in so many of the workspace may hold a widened block of a half-precision head


@dataclass(frozen=True)
class Operands:
    """What the op was called with, checked. teacher_head None means the student's head."""

    student_hidden: Tensor  # (N, D)
    head: Tensor  # (V, D)
    teacher_hidden: Tensor  # (N, E)
    teacher_head: Tensor | None  # (V, E)
    divergence: Divergence
    rows: RowKernel
    workspace_mib: float
    tokens: Tensor | None = None  # (N,) int64

    @property
    def heads(self) -> list[Tensor]:
        return [self.head] if self.teacher_head is None else [self.head, self.teacher_head]


@dataclass(frozen=True)
class Workspace:
    z_s: Tensor  # (rows, V) fp32
    z_t: Tensor  # (rows, V) fp32
    grad: Tensor | None  # (grad_rows, V) half; None: gradients overwrite z_s
    scratch: Tensor | None  # (elements,) fp32, the widened block of a head


def plan(ops: Operands, with_grad: bool) -> tuple[ChunkPlan, ChunkCosts]:
    vocab, width = ops.head.shape
    widest = max(head.shape[1] for head in ops.heads)
    grad_dtype = gemm.gradient_dtype(ops.head)
    costs = ChunkCosts(
        fixed=4 * _scratch_elements(ops) + ops.rows.scratch_bytes(vocab),
        # the fp32 pair of logits, and the widened, subtracted and gradient hidden states beside it
        row=4 * (2 * vocab + 2 * widest + 2 * width),
        grad_row=0 if grad_dtype == torch.float32 or not with_grad else 2 * vocab,
    )
    return plan_chunks(ops.student_hidden.shape[0], costs, ops.workspace_mib), costs


def sweep(
    ops: Operands,
    weights: Tensor | None,  # (N,) fp32 factor of each token's gradient
    hidden_grad: Tensor | None,  # (N, D), filled
    head_grad: Tensor | None,  # (V, D) fp32, added to
) -> RowOutputs:
    """Unweighted results of all tokens; weighted gradients where a tensor for them is given."""
    n = ops.student_hidden.shape[0]
    device = ops.student_hidden.device
    with_grad = hidden_grad is not None or head_grad is not None
    chunks, _ = plan(ops, with_grad)
    work = _allocate(ops, chunks, with_grad)
    out = RowOutputs(torch.empty(len(RESULTS), n, device=device))
    inverse = 1.0 / ops.divergence.temperature
    scale = torch.full((n,), inverse, device=device) if weights is None else weights * inverse
    for start, stop in chunks.groups():
        for first, last in chunks.chunks(start, stop):
            rows, tokens = slice(0, last - first), slice(first, last)
            z_s, z_t = work.z_s[rows], work.z_t[rows]
            _logits(ops, tokens, z_s, z_t, work.scratch)
            target = z_s if work.grad is None else work.grad[first - start : last - start]
            is_delta = ops.teacher_head is None
            grad = target if with_grad else None
            sampled = None if ops.tokens is None else ops.tokens[tokens]
            ops.rows.run(z_s, z_t, is_delta, ops.divergence, scale[tokens], grad, out.rows(tokens), sampled)
        if with_grad:
            grads = (work.z_s if work.grad is None else work.grad)[: stop - start]
            _gradients(ops, slice(start, stop), grads, work.scratch, hidden_grad, head_grad)
    return out


def _logits(ops: Operands, tokens: slice, z_s: Tensor, z_t: Tensor, scratch: Tensor | None) -> None:
    """Student logits, and the teacher's, or with a shared head their difference, itself one product."""
    student, teacher = ops.student_hidden[tokens], ops.teacher_hidden[tokens]
    block = _as_blocks(scratch, ops.head)
    if ops.teacher_head is None:
        gemm.logits_into([z_s, z_t], [student, student.float() - teacher.float()], ops.head, block)
    else:
        gemm.logits_into([z_s], [student], ops.head, block)
        gemm.logits_into([z_t], [teacher], ops.teacher_head, _as_blocks(scratch, ops.teacher_head))


def _gradients(
    ops: Operands,
    tokens: slice,
    grads: Tensor,
    scratch: Tensor | None,
    hidden_grad: Tensor | None,
    head_grad: Tensor | None,
) -> None:
    if hidden_grad is not None:
        hidden_grad[tokens] = gemm.hidden_gradient(grads, ops.head, _as_blocks(scratch, ops.head))
    if head_grad is not None:
        gemm.add_head_gradient(head_grad, grads, ops.student_hidden[tokens])


def _allocate(ops: Operands, chunks: ChunkPlan, with_grad: bool) -> Workspace:
    device, vocab = ops.student_hidden.device, ops.head.shape[0]
    grad_dtype = gemm.gradient_dtype(ops.head)
    in_place = not with_grad or grad_dtype == torch.float32
    elements = _scratch_elements(ops)
    return Workspace(
        z_s=torch.empty(chunks.rows, vocab, device=device),
        z_t=torch.empty(chunks.rows, vocab, device=device),
        grad=None if in_place else torch.empty(chunks.grad_rows, vocab, device=device, dtype=grad_dtype),
        scratch=torch.empty(elements, device=device) if elements else None,
    )


def _scratch_elements(ops: Operands) -> int:
    """fp32 elements of the widened head block: none, all of it, or what the budget's share holds (one row at least)."""
    half = [head for head in ops.heads if gemm.needs_widening(head)]
    if not half:
        return 0
    share = int(ops.workspace_mib * (1 << 20)) // SCRATCH_SHARE // 4
    return max(max(head.shape[1], min(head.numel(), share)) for head in half)


def _as_blocks(scratch: Tensor | None, head: Tensor) -> Tensor | None:  # (elements,) -> (blocks, D)
    if scratch is None:
        return None
    rows = scratch.numel() // head.shape[1]
    return scratch[: rows * head.shape[1]].view(rows, head.shape[1])
