# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton, between the sums and the gradient: terms of the value one by one, for JSD and for a clip.

Equations: csrc/row_terms.h, and divergence.py for the gradients.
"""

import triton
import triton.language as tl

from opsd_kernels.triton_math import exp_remainder, log_remainder, times
from opsd_kernels.triton_stats import FORWARD_KL, JSD, REVERSE_KL, TERMS, elements, merge_centre, merge_sums, segment


@triton.jit
def _far_ratios(u, beta):
    """g = ln(M/p), h = ln(q/M), from the side on which exp cannot overflow."""
    shrinks = u < 0.0
    y = tl.exp(-tl.abs(u)) - 1.0
    side = tl.log(1.0 + tl.where(shrinks, beta, 1.0 - beta) * y)
    return tl.where(shrinks, side, u + side), tl.where(shrinks, u - side, -side)


@triton.jit
def term(p, q, r, beta, kind: tl.constexpr):
    """The term f, its form that cannot be negative, JSD's part of KL(p||M), and what the slope is made of.

    f + (q - p) and r; -f of the teacher's side and p - q; f itself, p ln(p/M) + b (q - p) and ln(p/M).
    """
    if kind == REVERSE_KL:
        near = tl.abs(r) <= 1.0
        f = times(p, r)
        return f, tl.where(near, p * exp_remainder(tl.where(near, r, 0.0)), f + (q - p)), f, r
    if kind == FORWARD_KL:
        near = tl.abs(r) <= 1.0
        safe = tl.where(near, r, 0.0)
        k = exp_remainder(safe)
        f = -times(q, r)
        kept = tl.where(near, p * (safe * safe - k * (1.0 + safe)), f + (p - q))
        return f, kept, f, tl.where(near, p * (safe - k), p - q)
    near = tl.abs(r) <= 0.25
    growth = tl.where(near, -r, 0.0)
    growth += exp_remainder(-growth)  # q / p - 1
    back = (beta - 1.0) * growth / (1.0 + growth)
    g, h = _far_ratios(-r, beta)
    forth = beta * growth
    remainder = log_remainder(forth)
    student = tl.where(near, p * remainder, beta * (q - p) - times(p, g))
    teacher = tl.where(near, p * (1.0 + growth) * log_remainder(back), (1.0 - beta) * (p - q) + times(q, h))
    f = (1.0 - beta) * student + beta * teacher
    return f, f, student, tl.where(near, remainder - forth, -g)


@triton.jit
def terms_kernel(z_s, second, parts, vocab, stride, inverse_t, beta, clip, clips: tl.constexpr, kind: tl.constexpr,
                 delta: tl.constexpr, tile: tl.constexpr, splits: tl.constexpr,
                 count: tl.constexpr):  # fmt: skip
    """The sums of Terms in csrc/row_terms.h, in that order."""
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max, _excluded = merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    student, teacher, c, _kl = merge_sums(parts, row, t_max, kind, splits, count)
    begin, end = segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    zero = tl.zeros([tile], tl.float32)
    total, value, part, kept, lost, student_lost = zero, zero, zero, zero, zero, zero
    for start in range(begin, end, tile):
        _s, _t, d, e_s, e_t = elements(
            z_s, second, row, stride, start + lane, end, top, second_a, t_max, inverse_t, delta
        )
        p, q = e_s / student, e_t / teacher
        f, safe, to_student, x = term(p, q, d + c, beta, kind)
        total += safe
        if clips:
            over = f > clip
            mass = q if kind == FORWARD_KL else p
            value += tl.where(over, clip, f)
            part += tl.where(over, 0.0, times(p, x) if kind == JSD else f)
            kept += tl.where(over, 0.0, mass)
            lost += tl.where(over, mass, 0.0)
            if kind != REVERSE_KL:
                student_lost += tl.where(over, p, 0.0)
        else:
            part += to_student
    mine = parts + row * count * splits + tl.program_id(1)
    tl.store(mine + TERMS * splits, tl.sum(total, 0))
    tl.store(mine + (TERMS + 1) * splits, tl.sum(value, 0))
    tl.store(mine + (TERMS + 2) * splits, tl.sum(part, 0))
    tl.store(mine + (TERMS + 3) * splits, tl.sum(kept, 0))
    tl.store(mine + (TERMS + 4) * splits, tl.sum(lost, 0))
    tl.store(mine + (TERMS + 5) * splits, tl.sum(lost if kind == REVERSE_KL else student_lost, 0))


@triton.jit
def merge_terms(parts, row, clips: tl.constexpr, kind: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):
    """Value, sum for the shift of the slope, mass of kept and of clipped columns, the student's on clipped ones."""
    theirs = parts + row * count * splits + tl.arange(0, splits)
    safe = tl.sum(tl.load(theirs + TERMS * splits), 0)
    value = tl.sum(tl.load(theirs + (TERMS + 1) * splits), 0)
    part = tl.sum(tl.load(theirs + (TERMS + 2) * splits), 0)
    kept = tl.sum(tl.load(theirs + (TERMS + 3) * splits), 0)
    lost = tl.sum(tl.load(theirs + (TERMS + 4) * splits), 0)
    student_lost = tl.sum(tl.load(theirs + (TERMS + 5) * splits), 0)
    if not clips:
        return safe, part, kept, lost, student_lost
    if kind == JSD:
        return value, part, kept, lost, student_lost
    none = lost == 0.0
    part = tl.where(none, safe, part) if kind == REVERSE_KL else part
    return tl.where(none, tl.where(safe < 0.0, 0.0, safe), value), part, kept, lost, student_lost
