"""One pass over all tokens in chunks: logits, row kernel, gradient GEMMs. The only place where [rows, V] exists."""

import functools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import gemm, memory
from opsd_kernels.chunking import MAX_ROWS, MIB, ChunkCosts, ChunkPlan, plan_chunks
from opsd_kernels.divergence import Divergence
from opsd_kernels.heads import Head, is_same
from opsd_kernels.rows import RowKernel, RowOutputs, results_of

SCRATCH_SHARE = 8  # one part in so many of the workspace may hold a widened block of a half-precision head


@dataclass(frozen=True)
class Operands:
    """What the op was called with, checked; heads without padding, both in the same slices or none."""

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
        return float(self.head.factor / student), float(self.teacher_head.factor / teacher)

    @property
    def is_remote(self) -> bool:
        """Whether the teacher's products run on another device, from which its logits are copied."""
        return self.teacher_head.weight.device != self.head.weight.device

    @property
    def is_stacked(self) -> bool:
        """Whether both sides have the same weight: one product of both reads it once."""
        return is_same(self.head.weight, self.teacher_head.weight)

    @property
    def is_delta(self) -> bool:
        """Whether both sides are the same linear function, so that their difference is one product."""
        student, teacher = self.inverse_temperatures
        return student == teacher and self.head.softcap is None and self.head.equals(self.teacher_head)


@dataclass(frozen=True)
class Gradients:
    """Where gradients go, whatever was there before; None where none is wanted."""

    hidden: Tensor | None  # (N, D)
    weight: Tensor | None = None  # (V, D) fp32
    bias: Tensor | None = None  # (V,) fp32

    def __bool__(self) -> bool:
        return not (self.hidden is None and self.weight is None and self.bias is None)


@dataclass(frozen=True)
class Workspace:
    logits: Tensor  # (2, rows, V) fp32: z_s, and z_t or z_s - z_t
    z_remote: Tensor | None  # (rows, V) fp32, z_t on the teacher's device
    slope: Tensor | None  # (rows, V) fp32, derivative of the student's softcap
    grad: Tensor | None  # (grad_rows, V) half; None: gradients overwrite z_s
    scratch: Tensor | None  # (elements,) fp32, the widened block of a head
    scratch_remote: Tensor | None  # the same on the teacher's device

    def pair(self, n: int) -> Tensor:  # (2, n, V)
        """Logits of n tokens, contiguous: one product can fill both sides."""
        vocab = self.logits.shape[2]
        return self.logits.view(-1)[: 2 * n * vocab].view(2, n, vocab)


def plan(ops: Operands, with_grad: bool, trains_head: bool = True) -> tuple[ChunkPlan, ChunkCosts]:
    vocab, width = ops.head.largest_slice, ops.head.weight.shape[1]
    widest = max(width, ops.teacher_head.weight.shape[1])
    grad_dtype = gemm.gradient_dtype(ops.head.weight)
    logits = 3 if with_grad and ops.head.softcap is not None else 2
    padding = gemm.padding_bytes(vocab, ops.head.weight.device)
    costs = ChunkCosts(
        fixed=4 * _scratch_elements(ops) + ops.rows.scratch_bytes(vocab) + padding,
        # the fp32 logits, and the widened, subtracted and gradient hidden states beside them
        row=4 * (logits * vocab + 2 * widest + 2 * width),
        grad_row=0 if grad_dtype == torch.float32 or not with_grad else 2 * vocab,
    )
    # one product of both sides has twice the rows; a CPU packs the weight anew for each, and has memory to spare
    halved = ops.is_stacked and not trains_head and ops.head.weight.device.type != "cpu"
    most = MAX_ROWS // 2 if halved else MAX_ROWS
    return plan_chunks(ops.student_hidden.shape[0], costs, ops.workspace_mib, trains_head, most), costs


def sweep(
    ops: Operands,
    weights: Tensor | None,  # (N,) fp32 factor of each token's gradient
    grads: Gradients,
) -> RowOutputs:
    """Unweighted results of all tokens; weighted gradients where a tensor for them is given."""
    n, device = ops.student_hidden.shape[0], ops.student_hidden.device
    fp32: Any = {"dtype": torch.float32, "device": device}  # whatever the program's default dtype is
    chunks, _ = plan(ops, bool(grads), grads.weight is not None)
    out = RowOutputs(torch.empty(len(results_of(ops.divergence)), n, **fp32))
    factor = ops.inverse_temperatures[0] * (1.0 if ops.head.softcap is None else ops.head.scale)
    scale = torch.full((n,), factor, **fp32) if weights is None else weights * factor
    with memory.workspace(device) as empty, _autocast_off(ops):
        work = _allocate(ops, chunks, bool(grads), empty)
        ops = _widened_once(ops, work.scratch)
        for start, stop in chunks.groups():
            for first, last in chunks.chunks(start, stop):
                pair = work.pair(last - first)
                target = pair[0] if work.grad is None else work.grad[first - start : last - start]
                _chunk(ops, slice(first, last), pair, work, scale, target if grads else None, out)
            if grads:
                collected = work.pair(stop - start)[0] if work.grad is None else work.grad[: stop - start]
                _gradients(ops, slice(start, stop), collected, scale, work.scratch, grads)
    return out


@contextmanager
def _autocast_off(ops: Operands) -> Iterator[None]:
    with ExitStack() as stack:
        for device in {head.weight.device.type for head in (ops.head, ops.teacher_head)}:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _chunk(
    ops: Operands,
    tokens: slice,
    pair: Tensor,  # (2, n, V), consumed
    work: Workspace,
    scale: Tensor,
    grad: Tensor | None,
    out: RowOutputs,
) -> None:
    z_s, z_t = pair
    slope = None if work.slope is None else work.slope[: len(z_s)]
    _logits(ops, tokens, pair, work, slope)
    # the rows see one temperature; where the sides differ, _logits has brought the teacher to the student's
    divergence = replace(ops.divergence, temperature=1.0 / ops.inverse_temperatures[0], teacher_temperature=None)
    sampled = None if ops.tokens is None else ops.tokens[tokens]
    target = grad if slope is None or grad is None else z_s
    ops.rows.run(z_s, z_t, ops.is_delta, divergence, scale[tokens], target, out.rows(tokens), sampled)
    if slope is not None and grad is not None:
        torch.mul(z_s, slope, out=grad)


def _logits(ops: Operands, tokens: slice, pair: Tensor, work: Workspace, slope: Tensor | None) -> None:
    """pair = student logits, and the teacher's, or their difference, itself a product."""
    student, teacher = ops.student_hidden[tokens], ops.teacher_hidden[tokens]
    head, teacher_head, (z_s, z_t) = ops.head, ops.teacher_head, pair
    block = _as_blocks(work.scratch, head.weight)
    z = z_t if work.z_remote is None else work.z_remote[: len(teacher)]
    if ops.is_stacked:
        second = student.float() - teacher.float() if ops.is_delta else teacher.float()
        stacked = torch.cat([student.float(), second])
        gemm.logits_into(pair.view(len(stacked), -1), stacked, head.weight, block)
    else:
        scratch = work.scratch if work.z_remote is None else work.scratch_remote
        gemm.logits_into(z_s, student, head.weight, block)
        gemm.logits_into(z, teacher.to(z.device), teacher_head.weight, _as_blocks(scratch, teacher_head.weight))
    head.finish_(z_s, slope)
    if ops.is_delta:
        return
    teacher_head.finish_(z, None)
    if z is not z_t:
        z_t.copy_(z)
    inverse, teacher_inverse = ops.inverse_temperatures
    if inverse != teacher_inverse:
        z_t.mul_(teacher_inverse / inverse)


def _gradients(
    ops: Operands, tokens: slice, collected: Tensor, scale: Tensor, scratch: Tensor | None, grads: Gradients
) -> None:
    is_first = tokens.start == 0
    if grads.hidden is not None:
        block = _as_blocks(scratch, ops.head.weight)
        partial = gemm.hidden_gradient(collected, ops.head.weight, block)
        if ops.head.shard is not None:  # every slice of the vocabulary adds to it
            dist.all_reduce(partial, group=ops.head.shard.group)
        grads.hidden[tokens] = partial
    if grads.weight is not None:
        # a token of weight 0 has no gradient, but 0 times what it holds may be NaN
        hidden = ops.student_hidden[tokens].masked_fill(scale[tokens, None] == 0, 0)
        gemm.head_gradient_into(grads.weight, collected, hidden, add=not is_first)
    if grads.bias is not None:
        column_sums = collected.sum(0, dtype=torch.float32)
        grads.bias.copy_(column_sums) if is_first else grads.bias.add_(column_sums)


def _allocate(ops: Operands, chunks: ChunkPlan, with_grad: bool, empty: memory.Empty) -> Workspace:
    vocab, grad_dtype = ops.head.weight.shape[0], gemm.gradient_dtype(ops.head.weight)
    in_place = not with_grad or grad_dtype == torch.float32
    elements = _scratch_elements(ops)
    there = functools.partial(torch.empty, dtype=torch.float32, device=ops.teacher_head.weight.device)
    capped = with_grad and ops.head.softcap is not None
    return Workspace(
        logits=empty(2, chunks.rows, vocab),
        z_remote=there(chunks.rows, vocab) if ops.is_remote else None,
        slope=empty(chunks.rows, vocab) if capped else None,
        grad=None if in_place else empty(chunks.grad_rows, vocab, dtype=grad_dtype),
        scratch=empty(elements) if elements else None,
        scratch_remote=there(elements) if elements and ops.is_remote else None,
    )


def _scratch_elements(ops: Operands) -> int:
    budget = int(ops.workspace_mib * MIB) // SCRATCH_SHARE // 4
    return max(head.scratch_elements(budget) for head in (ops.head, ops.teacher_head))


def _widened_once(ops: Operands, scratch: Tensor | None) -> Operands:
    """With a half head in fp32 where one weight serves both sides and all of it fits, instead of for every product."""
    weight = ops.head.weight
    if scratch is None or not ops.is_stacked or weight.numel() > scratch.numel():
        return ops
    wide = scratch[: weight.numel()].view(weight.shape).copy_(weight)
    head, teacher_head = (replace(head, weight=wide) for head in (ops.head, ops.teacher_head))
    return replace(ops, head=head, teacher_head=teacher_head)


def _as_blocks(scratch: Tensor | None, head: Tensor) -> Tensor | None:  # (elements,) -> (blocks, D)
    if scratch is None:
        return None
    rows = scratch.numel() // head.shape[1]
    return scratch[: rows * head.shape[1]].view(rows, head.shape[1])
