# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton, second half of a row: terms of the mixture, results and gradient. Plan: rows_triton.py."""

import triton
import triton.language as tl

from opsd_kernels.rows import RESULTS
from opsd_kernels.triton_math import exp_remainder, log_remainder, times
from opsd_kernels.triton_stats import FORWARD_KL, JSD, REVERSE_KL, TOKEN, elements, merge_centre, merge_sums, segment

VALUE = tl.constexpr(RESULTS.index("value"))
STUDENT_ENTROPY = tl.constexpr(RESULTS.index("student_entropy"))
TEACHER_ENTROPY = tl.constexpr(RESULTS.index("teacher_entropy"))
STUDENT_LSE = tl.constexpr(RESULTS.index("student_lse"))
TEACHER_LSE = tl.constexpr(RESULTS.index("teacher_lse"))
TOP1_AGREEMENT = tl.constexpr(RESULTS.index("top1_agreement"))
STUDENT_LOGPROB = tl.constexpr(RESULTS.index("student_logprob"))
TEACHER_LOGPROB = tl.constexpr(RESULTS.index("teacher_logprob"))


@triton.jit
def mixture_kernel(z_s, second, parts, vocab, stride, inverse_t, beta, kind: tl.constexpr, delta: tl.constexpr,
                    tile: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max = merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    student, teacher, c, _kl = merge_sums(parts, row, t_max, kind, splits, count)
    begin, end = segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    to_student = tl.zeros([tile], tl.float32)
    to_teacher = tl.zeros([tile], tl.float32)
    for start in range(begin, end, tile):
        _s, _t, d, e_s, e_t = elements(
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
def _by_products(parts, tokens, out, row, out_stride, vocab, top, second_a, t_max, student, teacher, inverse_t,
                 delta: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    """Everything but the value into out (RESULTS, n)."""
    theirs = parts + row * count * splits
    lane = tl.arange(0, splits)
    log_student, log_teacher = tl.log(student), tl.log(teacher)
    mine = out + row
    moment = tl.sum(tl.load(theirs + 8 * splits + lane), 0)
    tl.store(mine + STUDENT_ENTROPY * out_stride, log_student - moment / student)
    moment = tl.sum(tl.load(theirs + 9 * splits + lane), 0)
    tl.store(mine + TEACHER_ENTROPY * out_stride, log_teacher - moment / teacher)
    teacher_a = top - second_a if delta else second_a
    tl.store(mine + STUDENT_LSE * out_stride, top * inverse_t + log_student)
    tl.store(mine + TEACHER_LSE * out_stride, teacher_a * inverse_t + t_max + log_teacher)
    tl.store(mine + TOP1_AGREEMENT * out_stride, tl.where(t_max <= 0.0, 1.0, 0.0))
    log_p, log_q = t_max * 0.0, t_max * 0.0
    if tokens is not None:
        token = tl.load(tokens + row)
        x = tl.load(theirs + TOKEN * splits) - top
        y = tl.load(theirs + (TOKEN + 1) * splits) - second_a
        inside = token < vocab
        t = (x - y if delta else y) * inverse_t
        log_p = tl.where(token < 0, 0.0, tl.where(inside, x * inverse_t - log_student, float("nan")))
        log_q = tl.where(token < 0, 0.0, tl.where(inside, t - t_max - log_teacher, float("nan")))
    tl.store(mine + STUDENT_LOGPROB * out_stride, log_p)
    tl.store(mine + TEACHER_LOGPROB * out_stride, log_q)


@triton.jit
def gradient_kernel(z_s, second, tokens, parts, scale, grad, out, vocab, stride, grad_stride, out_stride, inverse_t,
                    beta, with_grad: tl.constexpr, kind: tl.constexpr, delta: tl.constexpr, tile: tl.constexpr,
                    splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max = merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    student, teacher, c, value = merge_sums(parts, row, t_max, kind, splits, count)
    shift = value
    theirs = parts + row * count * splits + tl.arange(0, splits)
    if kind == JSD:
        shift = tl.sum(tl.load(theirs + 10 * splits), 0)
        value = (1.0 - beta) * shift + beta * tl.sum(tl.load(theirs + 11 * splits), 0)
    if tl.program_id(1) == 0:
        tl.store(out + VALUE * out_stride + row, tl.where(value < 0.0, 0.0, value))
        _by_products(parts, tokens, out, row, out_stride, vocab, top, second_a, t_max, student, teacher, inverse_t,
                     delta, splits, count)  # fmt: skip
    if with_grad:
        begin, end = segment(vocab, tile, splits)
        factor = tl.load(scale + row)
        lane = tl.arange(0, tile)
        for start in range(begin, end, tile):
            column = start + lane
            _s, _t, d, e_s, e_t = elements(
                z_s, second, row, stride, column, end, top, second_a, t_max, inverse_t, delta
            )
            slope = _slope(e_s / student, e_t / teacher, d + c, shift, beta, kind)
            tl.store(grad + row * grad_stride + column, factor * slope, mask=column < end)
