"""CUDA row kernels in Triton: numerics of csrc/row.cpp, with `splits` programs per row that loop over tiles.

centre    each program's maximum of both rows and where the student's is
sums      merges the centres of its row, then sums its columns
mixture   JSD only: merges the sums, then its part of both KLs to the mixture
gradient  merges everything of its row (the first program writes the results), then writes its columns

Programs meet only in partial results, each written by one of them and merged in a fixed order: no atomics, so two
runs agree to the bit. Nothing but `out` and `grad` is written to, and z_s[a] is kept beside its index, so that
`grad` may be z_s.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from opsd_kernels.divergence import KINDS, Divergence
from opsd_kernels.launch import INTERPRETER, Launch, launch_for
from opsd_kernels.rows import RowOutputs
from opsd_kernels.triton_math import exp_remainder, ln_one_plus, log_remainder, times

PARTS = 12  # partial results of a program: 3 of centre, 7 of sums, 2 of mixture; (rows, PARTS, splits) in memory
REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
JSD = tl.constexpr(KINDS.index("jsd"))


@triton.jit
def _segment(vocab, tile: tl.constexpr, splits: tl.constexpr):
    """First and last column of this program."""
    size = tl.cdiv(tl.cdiv(vocab, tile), splits) * tile
    begin = tl.program_id(1) * size
    return begin, tl.minimum(begin + size, vocab)


@triton.jit
def _centre_kernel(z_s, second, parts, vocab, stride, delta: tl.constexpr, tile: tl.constexpr,
                   splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = _segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    top = tl.full([tile], float("-inf"), tl.float32)
    teacher_top = tl.full([tile], float("-inf"), tl.float32)
    where_top = tl.full([tile], 0, tl.int32)
    for start in range(begin, end, tile):
        column = start + lane
        x = tl.load(z_s + row * stride + column, mask=column < end, other=float("-inf"))
        y = tl.load(second + row * stride + column, mask=column < end, other=float("-inf"))
        teacher = tl.where(column < end, x - y, float("-inf")) if delta else y
        where_top = tl.where(x > top, column, where_top)
        top = tl.where(x > top, x, top)
        teacher_top = tl.where(teacher > teacher_top, teacher, teacher_top)
    best = tl.max(top, 0)
    index = tl.min(tl.where(top == best, where_top, vocab), 0)
    mine = parts + row * count * splits + tl.program_id(1)
    tl.store(mine, best)
    tl.store(mine + 1 * splits, index.to(tl.float32, bitcast=True))
    tl.store(mine + 2 * splits, tl.max(teacher_top, 0))


@triton.jit
def _merge_centre(second, parts, row, stride, inverse_t, delta: tl.constexpr, splits: tl.constexpr,
                  count: tl.constexpr):  # fmt: skip
    """z_s[a], second[a], and the teacher's maximum in centred units."""
    theirs = parts + row * count * splits + tl.arange(0, splits)
    tops = tl.load(theirs)
    indices = tl.load(theirs + splits).to(tl.int32, bitcast=True)
    top = tl.max(tops, 0)
    a = tl.min(tl.where(tops == top, indices, 2147483647), 0)
    second_a = tl.load(second + row * stride + a)
    teacher_a = top - second_a if delta else second_a
    teacher_top = tl.max(tl.load(theirs + 2 * splits), 0)
    return top, second_a, (teacher_top - teacher_a) * inverse_t


@triton.jit
def _elements(z_s, second, row, stride, column, end, top, second_a, t_max, inverse_t, delta: tl.constexpr):
    """s, t - t_max, d, exp(s), exp(t - t_max) of a tile."""
    x = tl.load(z_s + row * stride + column, mask=column < end, other=float("-inf"))
    y = tl.load(second + row * stride + column, mask=column < end, other=float("-inf"))
    student = x - top
    other = y - second_a
    s = student * inverse_t
    d = (other if delta else student - other) * inverse_t  # subtracted first: equal rows give 0, whatever is fused
    t = (student - other if delta else other) * inverse_t
    t = tl.where(column < end, t, float("-inf")) - t_max
    return s, t, d, tl.exp(s), tl.exp(t)


@triton.jit
def _sums_kernel(z_s, second, parts, vocab, stride, inverse_t, kind: tl.constexpr, delta: tl.constexpr,
                 tile: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max = _merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    begin, end = _segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    zero = tl.zeros([tile], tl.float32)
    student, difference, far_teacher, far_student = zero, zero, zero, zero
    moment, student_moment, teacher_moment = zero, zero, zero
    unit = tl.exp(-t_max)
    for start in range(begin, end, tile):
        s, t, d, e_s, e_t = _elements(
            z_s, second, row, stride, start + lane, end, top, second_a, t_max, inverse_t, delta
        )
        near = tl.abs(d) <= 1.0  # false for inf - inf, whose terms are 0 on the far side
        d_near = tl.where(near, d, 0.0)
        e_near = tl.where(near, e_s, 0.0)
        k = exp_remainder(d_near)
        student += e_s
        difference += e_near * (k - d_near)
        far_teacher += tl.where(near, 0.0, e_t)
        far_student += tl.where(near, 0.0, e_s)
        if kind == REVERSE_KL:
            moment += tl.where(near, e_near * k, times(e_s, d))
        elif kind == FORWARD_KL:
            k_back = d_near * d_near - k * (1.0 + d_near)  # exp(-d) k(-d)
            moment += tl.where(near, unit * e_near * k_back, -times(e_t, d))
        student_moment += times(e_s, s)
        teacher_moment += times(e_t, t)
    mine = parts + row * count * splits + tl.program_id(1)
    tl.store(mine + 3 * splits, tl.sum(student, 0))
    tl.store(mine + 4 * splits, tl.sum(difference, 0))
    tl.store(mine + 5 * splits, tl.sum(far_teacher, 0))
    tl.store(mine + 6 * splits, tl.sum(far_student, 0))
    tl.store(mine + 7 * splits, tl.sum(moment, 0))
    tl.store(mine + 8 * splits, tl.sum(student_moment, 0))
    tl.store(mine + 9 * splits, tl.sum(teacher_moment, 0))


@triton.jit
def _merge_sums(parts, row, t_max, kind: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):
    """S, Q in units of exp(t_max), c = ln(Q / S), and the value of the two KLs."""
    theirs = parts + row * count * splits + tl.arange(0, splits)
    student = tl.sum(tl.load(theirs + 3 * splits), 0)
    near = tl.sum(tl.load(theirs + 4 * splits), 0)
    far_teacher = tl.sum(tl.load(theirs + 5 * splits), 0)
    far_student = tl.sum(tl.load(theirs + 6 * splits), 0)
    moment = tl.sum(tl.load(theirs + 7 * splits), 0)
    unit = tl.exp(-t_max)
    far = far_teacher * tl.exp(tl.minimum(t_max, 30.0)) - far_student
    ratio = (near + far) / student  # Q / S - 1
    teacher = unit * (student + near - far_student) + far_teacher
    c = tl.where(t_max < 30.0, ln_one_plus(ratio), t_max + tl.log(teacher / student))
    # where Q is close to S, first-order terms are cancelled before they are summed
    close = tl.abs(ratio) <= 0.25
    value = c * 0.0
    if kind == REVERSE_KL:
        fine = (moment + far) / student - log_remainder(tl.where(close, ratio, 0.0))
        value = tl.where(close, fine, (moment - near) / student + c)
    elif kind == FORWARD_KL:
        back = tl.where(close, -(near + far) / (student + near + far), 0.0)  # S / Q - 1
        fine = (moment - unit * far) / teacher - log_remainder(back)
        value = tl.where(close, fine, (moment + unit * near) / teacher - c)
    return student, teacher, c, value


@triton.jit
def _mixture_kernel(z_s, second, parts, vocab, stride, inverse_t, beta, kind: tl.constexpr, delta: tl.constexpr,
                    tile: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max = _merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    student, teacher, c, _kl = _merge_sums(parts, row, t_max, kind, splits, count)
    begin, end = _segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    to_student = tl.zeros([tile], tl.float32)
    to_teacher = tl.zeros([tile], tl.float32)
    for start in range(begin, end, tile):
        _s, _t, d, e_s, e_t = _elements(
            z_s, second, row, stride, start + lane, end, top, second_a, t_max, inverse_t, delta
        )
        p, q, u = e_s / student, e_t / teacher, -(d + c)
        near = tl.abs(u) <= 0.25
        growth = tl.where(near, u, 0.0)
        growth += exp_remainder(-growth)  # exp(u) - 1
        back = (beta - 1.0) * growth / (1.0 + growth)
        g, h = _far_ratios(u, beta)
        near_student = p * log_remainder(beta * growth)
        near_teacher = p * (1.0 + growth) * log_remainder(back)
        to_student += tl.where(near, near_student, beta * (q - p) - times(p, g))
        to_teacher += tl.where(near, near_teacher, (1.0 - beta) * (p - q) + times(q, h))
    mine = parts + row * count * splits + tl.program_id(1)
    tl.store(mine + 10 * splits, tl.sum(to_student, 0))
    tl.store(mine + 11 * splits, tl.sum(to_teacher, 0))


@triton.jit
def _far_ratios(u, beta):
    """g = ln(M/p), h = ln(q/M), from the side on which exp cannot overflow."""
    shrinks = u < 0.0
    y = tl.exp(-tl.abs(u)) - 1.0
    side = tl.log(1.0 + tl.where(shrinks, beta, 1.0 - beta) * y)
    return tl.where(shrinks, side, u + side), tl.where(shrinks, u - side, -side)


@triton.jit
def _slope(p, q, r, shift, beta, kind: tl.constexpr):
    """d value / d (z_s / T); shift is the reverse KL, or KL(p||M)."""
    if kind == REVERSE_KL:
        return times(p, r - shift)
    if kind == FORWARD_KL:
        near = tl.abs(r) <= 1.0
        safe = tl.where(near, r, 0.0)
        return tl.where(near, p * (safe - exp_remainder(safe)), p - q)
    near = tl.abs(r) <= 0.25
    growth = tl.where(near, -r, 0.0)
    growth += exp_remainder(-growth)
    g, _h = _far_ratios(-r, beta)
    forth = beta * growth
    log_ratio = tl.where(near, log_remainder(forth) - forth, -g)
    return times(p, log_ratio - shift) * (1.0 - beta)


@triton.jit
def _gradient_kernel(z_s, second, parts, scale, grad, value_out, student_entropy, teacher_entropy, vocab, stride,
                     grad_stride, inverse_t, beta, with_grad: tl.constexpr, kind: tl.constexpr,
                     delta: tl.constexpr, tile: tl.constexpr, splits: tl.constexpr,
                     count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max = _merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    student, teacher, c, value = _merge_sums(parts, row, t_max, kind, splits, count)
    shift = value
    theirs = parts + row * count * splits + tl.arange(0, splits)
    if kind == JSD:
        shift = tl.sum(tl.load(theirs + 10 * splits), 0)
        value = (1.0 - beta) * shift + beta * tl.sum(tl.load(theirs + 11 * splits), 0)
    if tl.program_id(1) == 0:
        tl.store(value_out + row, tl.where(value < 0.0, 0.0, value))
        moment = tl.sum(tl.load(theirs + 8 * splits), 0)
        tl.store(student_entropy + row, tl.log(student) - moment / student)
        moment = tl.sum(tl.load(theirs + 9 * splits), 0)
        tl.store(teacher_entropy + row, tl.log(teacher) - moment / teacher)
    if with_grad:
        begin, end = _segment(vocab, tile, splits)
        factor = tl.load(scale + row)
        lane = tl.arange(0, tile)
        for start in range(begin, end, tile):
            column = start + lane
            _s, _t, d, e_s, e_t = _elements(
                z_s, second, row, stride, column, end, top, second_a, t_max, inverse_t, delta
            )
            slope = _slope(e_s / student, e_t / teacher, d + c, shift, beta, kind)
            tl.store(grad + row * grad_stride + column, factor * slope, mask=column < end)


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or ""."""
    if device.type == "cuda" or not isinstance(_sums_kernel, triton.JITFunction):  # the latter: the interpreter
        return ""
    return "it runs on cuda tensors, and on cpu tensors only in Triton's interpreter"


def scratch_bytes(vocab: int) -> int:
    return 4 * PARTS * 8 * 512


def run(
    z_s: Tensor,  # (n, V) fp32, consumed
    z_t: Tensor,  # (n, V) fp32, consumed; holds z_s - z_t when is_delta
    is_delta: bool,
    divergence: Divergence,
    scale: Tensor,  # (n,) fp32 weight of each row's gradient
    grad: Tensor | None,  # (n, V), may be z_s
    out: RowOutputs,
) -> None:
    """Fill `out` and, unless None, grad = scale * d value / d (z_s / temperature)."""
    rows, vocab = z_s.shape
    launch = _launch(z_s.device)
    parts = torch.empty(rows, PARTS, launch.splits, device=z_s.device)
    kind, inverse_t, beta = KINDS.index(divergence.kind), 1.0 / divergence.temperature, divergence.beta
    same = {"delta": is_delta, "tile": launch.tile, "splits": launch.splits, "count": PARTS}
    same["num_warps"] = launch.warps
    stride = z_s.stride(0)
    grid = (rows, launch.splits)
    _centre_kernel[grid](z_s, z_t, parts, vocab, stride, **same)
    _sums_kernel[grid](z_s, z_t, parts, vocab, stride, inverse_t, kind=kind, **same)
    if divergence.kind == "jsd":
        _mixture_kernel[grid](z_s, z_t, parts, vocab, stride, inverse_t, beta, kind=kind, **same)
    target = z_s if grad is None else grad
    _gradient_kernel[grid if grad is not None else (rows, 1)](
        *(z_s, z_t, parts, scale, target, out.value, out.student_entropy, out.teacher_entropy, vocab, stride),
        *(target.stride(0), inverse_t, beta),
        with_grad=grad is not None,
        kind=kind,
        **same,
    )


def _launch(device: torch.device) -> Launch:
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return launch_for(10 * major + minor)
