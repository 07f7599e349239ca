"""fused_token_kl for torch.compile: one opaque node forward, one backward, whose shapes are known without running.

Same sweep and same results as autograd.py. Gradients are scaled into new tensors, not in place: a compiled step holds
them once more for a moment.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd_kernels.autograd import is_uniform, targets, times, unfilled
from opsd_kernels.divergence import SIDES, Divergence, TopK
from opsd_kernels.heads import Head, VocabShard
from opsd_kernels.rows import APPROXIMATED, RESULTS, row_kernel
from opsd_kernels.sweep import Operands, sweep


class Settings(NamedTuple):
    """Everything that is not a tensor, in types that an operator may take."""

    kind: str
    backend: str
    group: str  # name of the process group that holds the vocabulary in slices; "": none
    numbers: list[float]  # beta, temperature, the teacher's, clip, scale, softcap, the teacher's two, workspace_mib
    counts: list[int]  # valid rows of both heads; k (0: no support), tail, side of TopK; rows of every slice

    @classmethod
    def of(cls, divergence: Divergence, head: Head, teacher: Head, backend: str, workspace_mib: float) -> "Settings":
        clip = math.inf if divergence.clip is None else divergence.clip
        numbers = [divergence.beta, *divergence.temperatures, clip]
        for side in (head, teacher):
            numbers += [side.scale, math.inf if side.softcap is None else side.softcap]
        support, shard = divergence.support, head.view().shard
        counts = [x.view().weight.shape[0] for x in (head, teacher)]
        counts += [0, 0, 0] if support is None else [int(support.k), int(support.tail), SIDES.index(support.of)]
        group = "" if shard is None else shard.group.group_name
        counts += [] if shard is None else shard.known_sizes
        return cls(divergence.kind, backend, group, [float(x) for x in (*numbers, workspace_mib)], counts)

    @property
    def divergence(self) -> Divergence:
        beta, temperature, teacher_temperature, clip = self.numbers[:4]
        k, tail, side = self.counts[2:5]
        support = TopK(k, bool(tail), SIDES[side]) if k else None
        return Divergence(self.kind, beta, temperature, teacher_temperature, _optional(clip), support)

    @property
    def shard(self) -> VocabShard | None:
        if not self.group:
            return None
        # what torch's own operators on groups are given, and how they find them
        group = torch._C._distributed_c10d._resolve_process_group(self.group)  # type: ignore[arg-type]
        return VocabShard(group, tuple(self.counts[5:]))

    def head(self, side: int, weight: Tensor, bias: Tensor | None) -> Head:
        """Without padding."""
        scale, softcap = self.numbers[4 + 2 * side : 6 + 2 * side]
        rows = self.counts[side]
        bias = None if bias is None else bias.detach()[:rows]
        return Head(weight.detach()[:rows], bias, scale, _optional(softcap), shard=self.shard)


def _optional(x: float) -> float | None:
    return None if x == math.inf else x


class Sides(NamedTuple):
    """The tensors; teacher_weight None is the student's head."""

    student_hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    teacher_hidden: Tensor
    teacher_weight: Tensor | None
    teacher_bias: Tensor | None
    tokens: Tensor | None


def token_kl(
    student_hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    weights: Tensor | None,
    tokens: Tensor | None,
    settings: Settings,
) -> tuple[Tensor, Tensor]:  # weighted values, and all results
    shared = teacher_head is head
    wanted = [torch.is_grad_enabled() and x is not None and x.requires_grad for x in (student_hidden, *_own(head))]
    value, table, *_ = _forward(
        *(student_hidden, *_own(head), teacher_hidden.detach()),
        *((None, None) if shared else (x if x is None else x.detach() for x in _own(teacher_head))),
        *(tokens, weights, wanted, *settings),
    )
    return value, table


def _own(head: Head) -> tuple[Tensor, Tensor | None]:
    return head.weight, head.bias


def _operands(sides: Sides, settings: Settings) -> Operands:
    student = teacher = settings.head(0, sides.weight, sides.bias)
    if sides.teacher_weight is not None:
        teacher = settings.head(1, sides.teacher_weight, sides.teacher_bias)
    device, divergence, mib = sides.student_hidden.device, settings.divergence, settings.numbers[8]
    return Operands(
        student_hidden=sides.student_hidden.detach(),
        head=student,
        teacher_hidden=sides.teacher_hidden,
        teacher_head=teacher,
        divergence=divergence,
        rows=row_kernel(settings.backend, device, divergence, student.shard, mib),
        workspace_mib=mib,
        tokens=None if sides.tokens is None else sides.tokens.contiguous(),
    )


def _check_kept(*operands: Tensor | None) -> None:
    """Autograd keeps no such tensor, and what is traced cannot be asked."""
    if any(x is not None and x.is_inference() for x in operands):
        raise ValueError(
            "expected a teacher, tokens and token_weights made under torch.no_grad where torch.compile trains the head "
            "(its backward keeps them), got a tensor of torch.inference_mode"
        )


@torch.library.custom_op("opsd::fused_token_kl", mutates_args=())
def _forward(
    student_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    weights: Tensor | None,
    wanted: list[bool],
    kind: str,
    backend: str,
    group: str,
    numbers: list[float],
    counts: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # value, all results, and gradients, empty where not wanted
    sides = Sides(student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, tokens)
    if any(wanted[1:]):
        _check_kept(weights, *sides)
    ops = _operands(sides, Settings(kind, backend, group, numbers, counts))
    grads = [torch.empty_like(student_hidden) if wanted[0] else None]
    grads += [
        unfilled(x) if want and x is not None else None for x, want in zip((weight, bias), wanted[1:], strict=True)
    ]
    out = sweep(ops, weights, targets(ops, *grads))
    value = out["value"].clone() if weights is None else times(weights, out["value"])
    hidden_grad, weight_grad, bias_grad = (student_hidden.new_empty(0) if x is None else x for x in grads)
    return value, out.table, hidden_grad, weight_grad, bias_grad


@_forward.register_fake
def _(student_hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    wanted: list[bool] = rest[5]
    results = RESULTS + APPROXIMATED if rest[10][2] else RESULTS
    n = student_hidden.shape[0]
    grads = [torch.empty_like(student_hidden) if wanted[0] else student_hidden.new_empty(0)]
    for x, want in zip((weight, bias), wanted[1:], strict=True):
        grads.append(
            x.new_empty(x.shape, dtype=torch.float32) if want and x is not None else student_hidden.new_empty(0)
        )
    table = student_hidden.new_empty((len(results), n), dtype=torch.float32)
    return torch.empty_like(table[0]), table, *grads


@torch.library.custom_op("opsd::fused_token_kl_backward", mutates_args=())
def _backward(
    upstream: Tensor,
    hidden_grad: Tensor,
    weight_grad: Tensor,
    bias_grad: Tensor,
    student_hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    teacher_hidden: Tensor,
    teacher_weight: Tensor | None,
    teacher_bias: Tensor | None,
    tokens: Tensor | None,
    weights: Tensor | None,
    wanted: list[bool],
    kind: str,
    backend: str,
    group: str,
    numbers: list[float],
    counts: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    hidden = times(upstream[:, None], hidden_grad) if wanted[0] else hidden_grad.clone()
    pairs = [(weight_grad, weight, wanted[1]), (bias_grad, weight if bias is None else bias, wanted[2])]
    total: list[Tensor | None] = [None, None]
    if any(wanted[1:]) and upstream.numel() > 0:
        if is_uniform(upstream):
            total = [kept * upstream[0] if want else None for kept, _, want in pairs]
        else:
            sides = Sides(student_hidden, weight, bias, teacher_hidden, teacher_weight, teacher_bias, tokens)
            ops = _operands(sides, Settings(kind, backend, group, numbers, counts))
            arriving = upstream.float() if weights is None else upstream.float() * weights
            total = [unfilled(like) if want else None for _, like, want in pairs]
            sweep(ops, arriving.contiguous(), targets(ops, None, *total))
    weight_out, bias_out = (
        (kept.clone() if x is None else x).to(like.dtype if want else kept.dtype)
        for x, (kept, like, want) in zip(total, pairs, strict=True)
    )
    return hidden, weight_out, bias_out


@_backward.register_fake
def _(upstream: Tensor, hidden_grad: Tensor, weight_grad: Tensor, bias_grad: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weight, bias, wanted = rest[1], rest[2], rest[8]
    return (
        torch.empty_like(hidden_grad),
        torch.empty_like(weight_grad, dtype=weight.dtype if wanted[1] else None),
        torch.empty_like(bias_grad, dtype=bias.dtype if wanted[2] else None),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Operands are kept for a second sweep, where a head is trained."""
    tensors, ctx.rest = inputs[:8], inputs[8:]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*output[2:], *(tensors if any(ctx.rest[0][1:]) else ()))


def _differentiate(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    (hidden_grad, *others), wanted = ctx.saved_tensors, ctx.rest[0]
    if not any(wanted[1:]):
        nothing = hidden_grad.new_empty(0)
        others += [nothing, nothing, None, nothing, None, None, None, None]
    grads = _backward(upstream, hidden_grad, *others, *ctx.rest)
    kept = [grad if want else None for grad, want in zip(grads, wanted, strict=True)]
    return *kept, *[None] * 11


_forward.register_autograd(_differentiate, setup_context=_setup)


def _twice(ctx: Any, *_: Tensor) -> None:
    raise RuntimeError("fused_token_kl is differentiable once (once_differentiable): its backward has no derivative")


_backward.register_autograd(_twice)
