# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton, first half of a row: centre and sums, and how programs of a row merge them. Plan: rows_triton.py."""

import triton
import triton.language as tl

from opsd_kernels.divergence import KINDS
from opsd_kernels.triton_math import exp_remainder, ln_one_plus, log_remainder, times

REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
JSD = tl.constexpr(KINDS.index("jsd"))
# Partial results of a program, each `splits` floats apart in (rows, PARTS, splits):
# 0-2 centre, 3-9 sums, 10-15 terms, 16-17 logits of the sampled token (first program only)
PARTS = 18
TERMS = tl.constexpr(10)
TOKEN = tl.constexpr(16)


@triton.jit
def segment(vocab, tile: tl.constexpr, splits: tl.constexpr):
    """First and last column of this program."""
    size = tl.cdiv(tl.cdiv(vocab, tile), splits) * tile
    begin = tl.program_id(1) * size
    return begin, tl.minimum(begin + size, vocab)


@triton.jit
def centre_kernel(z_s, second, tokens, parts, vocab, stride, delta: tl.constexpr, tile: tl.constexpr,
                  splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    begin, end = segment(vocab, tile, splits)
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
    if tokens is not None:
        token = tl.load(tokens + row)
        if (tl.program_id(1) == 0) & (token >= 0) & (token < vocab):
            tl.store(mine + TOKEN * splits, tl.load(z_s + row * stride + token))
            tl.store(mine + (TOKEN + 1) * splits, tl.load(second + row * stride + token))


@triton.jit
def merge_centre(second, parts, row, stride, inverse_t, delta: tl.constexpr, splits: tl.constexpr,
                 count: tl.constexpr):  # fmt: skip
    """z_s[a], second[a], the teacher's maximum in centred units, and whether it excludes a (-inf).

    Then the teacher is centred at its own maximum, and d is infinite at a.
    """
    theirs = parts + row * count * splits + tl.arange(0, splits)
    tops = tl.load(theirs)
    indices = tl.load(theirs + splits).to(tl.int32, bitcast=True)
    top = tl.max(tops, 0)
    a = tl.min(tl.where(tops == top, indices, 2147483647), 0)
    second_a = tl.load(second + row * stride + a)
    teacher_a = top - second_a if delta else second_a
    teacher_top = tl.max(tl.load(theirs + 2 * splits), 0)
    excluded = teacher_a == float("-inf")
    second_a = tl.where(excluded, top - teacher_top if delta else teacher_top, second_a)
    return top, second_a, (teacher_top - tl.where(excluded, teacher_top, teacher_a)) * inverse_t, excluded


@triton.jit
def elements(z_s, second, row, stride, column, end, top, second_a, t_max, inverse_t, delta: tl.constexpr):
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
def sums_kernel(z_s, second, parts, vocab, stride, inverse_t, kind: tl.constexpr, delta: tl.constexpr,
                tile: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    top, second_a, t_max, _excluded = merge_centre(second, parts, row, stride, inverse_t, delta, splits, count)
    begin, end = segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    zero = tl.zeros([tile], tl.float32)
    student, difference, far_teacher, far_student = zero, zero, zero, zero
    moment, student_moment, teacher_moment = zero, zero, zero
    unit = tl.exp(-t_max)
    for start in range(begin, end, tile):
        s, t, d, e_s, e_t = elements(
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
def merge_sums(parts, row, t_max, kind: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):
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
