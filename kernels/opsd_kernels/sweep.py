"""One pass over all tokens in chunks: logits, row kernel, gradient GEMMs. The only place where [rows, V] exists."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd_kernels import gemm
from opsd_kernels.chunking import MIB, ChunkCosts, ChunkPlan, plan_chunks
from opsd_kernels.divergence import Divergence
from opsd_kernels.heads import Head
from opsd_kernels.rows import RESULTS, RowKernel, RowOutputs

SCRATCH_SHARE = 8  # one part in so many of the workspace may hold a widened block of a half-precision head


@dataclass(frozen=True)
class Operands:
    """What the op was called with, checked; heads without padding."""

    student_hidden: Tensor  # (N, D)
    head: Head  # (V, D)
    teacher_hidden: Tensor  # (N, E)
    teacher_head: Head  # (V, E)
    divergence: Divergence
    rows: RowKernel
    workspace_mib: float
    tokens: Tensor | None = None  # (N,) int64

    @property
    def inverse_temperatures(self) -> tuple[float, float]:
        """Factors of the student's and the teacher's products, or logits after a softcap."""
        student, teacher = self.divergence.temperatures
        return self.head.factor / student, self.teacher_head.factor / teacher

    @property
    def is_delta(self) -> bool:
        """Whether both sides are the same linear function, so that their difference is one product."""
        student, teacher = self.inverse_temperatures
        return student == teacher and self.head.softcap is None and self.head.equals(self.teacher_head)


@dataclass(frozen=True)
class Gradients:
    """Where gradients go; None where none is wanted."""

    hidden: Tensor | None  # (N, D), filled
    weight: Tensor | None = None  # (V, D) fp32, added to
    bias: Tensor | None = None  # (V,) fp32, added to

    def __bool__(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


@dataclass(frozen=True)
class Workspace:
    z_s: Tensor  # (rows, V) fp32
    z_t: Tensor  # (rows, V) fp32
    slope: Tensor | None  # (rows, V) fp32, derivative of the student's softcap
    grad: Tensor | None  # (grad_rows, V) half; None: gradients overwrite z_s
    scratch: Tensor | None  # (elements,) fp32, the widened block of a head


def plan(ops: Operands, with_grad: bool) -> tuple[ChunkPlan, ChunkCosts]:
    vocab, width = ops.head.weight.shape
    widest = max(width, ops.teacher_head.weight.shape[1])
    grad_dtype = gemm.gradient_dtype(ops.head.weight)
    logits = 3 if with_grad and ops.head.softcap is not None else 2
    costs = ChunkCosts(
        fixed=4 * _scratch_elements(ops) + ops.rows.scratch_bytes(vocab),
        # the fp32 logits, and the widened, subtracted and gradient hidden states beside them
        row=4 * (logits * vocab + 2 * widest + 2 * width),
        grad_row=0 if grad_dtype == torch.float32 or not with_grad else 2 * vocab,
    )
    return plan_chunks(ops.student_hidden.shape[0], costs, ops.workspace_mib), costs


def sweep(
    ops: Operands,
    weights: Tensor | None,  # (N,) fp32 factor of each token's gradient
    grads: Gradients,
) -> RowOutputs:
    """Unweighted results of all tokens; weighted gradients where a tensor for them is given."""
    n, device = ops.student_hidden.shape[0], ops.student_hidden.device
    chunks, _ = plan(ops, bool(grads))
    work = _allocate(ops, chunks, bool(grads))
    out = RowOutputs(torch.empty(len(RESULTS), n, device=device))
    factor = ops.inverse_temperatures[0] * (1.0 if ops.head.softcap is None else ops.head.scale)
    scale = torch.full((n,), factor, device=device) if weights is None else weights * factor
    for start, stop in chunks.groups():
        for first, last in chunks.chunks(start, stop):
            target = work.z_s[: last - first] if work.grad is None else work.grad[first - start : last - start]
            _chunk(ops, slice(first, last), work, scale, target if grads else None, out)
        if grads:
            collected = (work.z_s if work.grad is None else work.grad)[: stop - start]
            _gradients(ops, slice(start, stop), collected, work.scratch, grads)
    return out


def _chunk(ops: Operands, tokens: slice, work: Workspace, scale: Tensor, grad: Tensor | None, out: RowOutputs) -> None:
    rows = slice(0, tokens.stop - tokens.start)
    z_s, z_t = work.z_s[rows], work.z_t[rows]
    slope = None if work.slope is None else work.slope[rows]
    _logits(ops, tokens, z_s, z_t, slope, work.scratch)
    # the rows see one temperature; where the sides differ, _logits has brought the teacher to the student's
    divergence = replace(ops.divergence, temperature=1.0 / ops.inverse_temperatures[0], teacher_temperature=None)
    sampled = None if ops.tokens is None else ops.tokens[tokens]
    target = grad if slope is None or grad is None else z_s
    ops.rows.run(z_s, z_t, ops.is_delta, divergence, scale[tokens], target, out.rows(tokens), sampled)
    if slope is not None and grad is not None:
        torch.mul(z_s, slope, out=grad)


def _logits(
    ops: Operands, tokens: slice, z_s: Tensor, z_t: Tensor, slope: Tensor | None, scratch: Tensor | None
) -> None:
    """Student logits, and the teacher's, or their difference, itself one product."""
    student, teacher = ops.student_hidden[tokens], ops.teacher_hidden[tokens]
    block = _as_blocks(scratch, ops.head.weight)
    if ops.is_delta:
        gemm.logits_into([z_s, z_t], [student, student.float() - teacher.float()], ops.head.weight, block)
        ops.head.finish_(z_s, None)
        return
    gemm.logits_into([z_s], [student], ops.head.weight, block)
    gemm.logits_into([z_t], [teacher], ops.teacher_head.weight, _as_blocks(scratch, ops.teacher_head.weight))
    ops.head.finish_(z_s, slope)
    ops.teacher_head.finish_(z_t, None)
    inverse, teacher_inverse = ops.inverse_temperatures
    if inverse != teacher_inverse:
        z_t.mul_(teacher_inverse / inverse)


def _gradients(ops: Operands, tokens: slice, collected: Tensor, scratch: Tensor | None, grads: Gradients) -> None:
    if grads.hidden is not None:
        block = _as_blocks(scratch, ops.head.weight)
        grads.hidden[tokens] = gemm.hidden_gradient(collected, ops.head.weight, block)
    if grads.weight is not None:
        gemm.add_head_gradient(grads.weight, collected, ops.student_hidden[tokens])
    if grads.bias is not None:
        grads.bias.add_(collected.sum(0, dtype=torch.float32))


def _allocate(ops: Operands, chunks: ChunkPlan, with_grad: bool) -> Workspace:
    device, vocab = ops.student_hidden.device, ops.head.weight.shape[0]
    grad_dtype = gemm.gradient_dtype(ops.head.weight)
    in_place = not with_grad or grad_dtype == torch.float32
    elements = _scratch_elements(ops)
    capped = with_grad and ops.head.softcap is not None
    return Workspace(
        z_s=torch.empty(chunks.rows, vocab, device=device),
        z_t=torch.empty(chunks.rows, vocab, device=device),
        slope=torch.empty(chunks.rows, vocab, device=device) if capped else None,
        grad=None if in_place else torch.empty(chunks.grad_rows, vocab, device=device, dtype=grad_dtype),
        scratch=torch.empty(elements, device=device) if elements else None,
    )


def _scratch_elements(ops: Operands) -> int:
    budget = int(ops.workspace_mib * MIB) // SCRATCH_SHARE // 4
    return max(head.scratch_elements(budget) for head in (ops.head, ops.teacher_head))


def _as_blocks(scratch: Tensor | None, head: Tensor) -> Tensor | None:  # (elements,) -> (blocks, D)
    if scratch is None:
        return None
    rows = scratch.numel() // head.shape[1]
    return scratch[: rows * head.shape[1]].view(rows, head.shape[1])
