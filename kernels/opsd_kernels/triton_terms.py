# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton, between the sums and the gradient: terms of the value one by one, for JSD and for a clip.

Equations: csrc/row_terms.h, and divergence.py for the gradients.
"""

import triton
import triton.language as tl

from opsd_kernels.triton_math import LN2, exp_remainder, log_parts, log_remainder, times
from opsd_kernels.triton_stats import centred, logits, segment
from opsd_kernels.triton_sums import FORWARD_KL, JSD, REVERSE_KL, TERMS, merge, normalisers, total


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
    u = tl.where(near, -r, 0.0)
    remainder = exp_remainder(-u)
    growth = u + remainder  # q / p - 1
    grows = r < -0.25  # then M / p from the teacher's side, from which exp cannot overflow
    y = tl.where(grows, 1.0 - beta, beta) * tl.where(near, growth, tl.exp(-tl.abs(r)) - 1.0)
    exponent, y = log_parts(y)
    to_mixture = log_remainder(y)
    log_side = exponent * LN2 + (y - to_mixture)
    g = tl.where(grows, log_side - r, log_side)  # ln(M/p)
    h = tl.where(grows, -log_side, -r - log_side)  # ln(q/M)
    # f / p = b u exp(u) - m ln m with m = M / p, both sides without their terms of first order
    inner = beta * (u * growth - remainder) - (y * y - to_mixture * (1.0 + y))
    f = tl.where(near, p * inner, beta * times(q, h) - (1.0 - beta) * times(p, g))
    student = tl.where(near, p * to_mixture, beta * (q - p) - times(p, g))
    return f, f, student, -g


@triton.jit
def terms_kernel(z_s, second, parts, vocab, stride, inverse_t, furthest, beta, clip, clips: tl.constexpr,
                 kind: tl.constexpr, delta: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr,
                 splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    """The sums of Terms in csrc/row_terms.h, in that order."""
    row = tl.program_id(0).to(tl.int64)
    centre, sums = merge(parts, row, inverse_t, furthest, kind, delta, splits, count)
    student, teacher, c, _kl, _mean = normalisers(sums, centre[2] * inverse_t, kind)
    per_student, per_teacher = 1.0 / student, 1.0 / teacher
    begin, end = segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    zero = tl.zeros([tile], tl.float32)
    sure, value, part, kept, lost, student_lost = zero, zero, zero, zero, zero, zero
    for start in tl.range(begin, end, tile, num_stages=stages):
        column = start + lane
        z, other = logits(z_s, second, row, stride, column, end)
        _s, _t, d, e_s, e_t = centred(z, other, column < end, centre, inverse_t, delta)
        p, q = e_s * per_student, e_t * per_teacher
        f, safe, to_student, x = term(p, q, d + c, beta, kind)
        sure += safe
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
    tl.store(mine + TERMS * splits, tl.sum(sure, 0))
    tl.store(mine + (TERMS + 1) * splits, tl.sum(value, 0))
    tl.store(mine + (TERMS + 2) * splits, tl.sum(part, 0))
    tl.store(mine + (TERMS + 3) * splits, tl.sum(kept, 0))
    tl.store(mine + (TERMS + 4) * splits, tl.sum(lost, 0))
    tl.store(mine + (TERMS + 5) * splits, tl.sum(lost if kind == REVERSE_KL else student_lost, 0))


@triton.jit
def merge_terms(parts, row, clips: tl.constexpr, kind: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):
    """Value, sum for the shift of the slope, mass of kept and of clipped columns, the student's on clipped ones."""
    safe = total(parts, row, TERMS, splits, count)
    value = total(parts, row, TERMS + 1, splits, count)
    part = total(parts, row, TERMS + 2, splits, count)
    kept = total(parts, row, TERMS + 3, splits, count)
    lost = total(parts, row, TERMS + 4, splits, count)
    student_lost = total(parts, row, TERMS + 5, splits, count)
    if not clips:
        return safe, part, kept, lost, student_lost
    if kind == JSD:
        return value, part, kept, lost, student_lost
    none = lost == 0.0
    part = tl.where(none, safe, part) if kind == REVERSE_KL else part
    return tl.where(none, tl.where(safe < 0.0, 0.0, safe), value), part, kept, lost, student_lost
