# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton: sums of one part of a row around its own centre, moved to another, and merged over the row.

A centre is the state (top, ref, teacher_top, apart): the greatest student logit so far, at a; second[a]; the greatest
teacher logit; and 1 where that is `furthest` (apart_from) from the teacher's logit at a, -inf say, or nothing was seen.
Then ref stands for the teacher's own maximum instead. Around it, with k(x) = exp(-x) - 1 + x:

    s = (z_s - top) / T,   t = (z_t - z_t[a]) / T,   d = s - t,   t_max = max t = peak / T

    near            sum exp(s)                    |d| <= 1
    far             sum exp(s)                    |d| > 1
    growth          sum exp(s) (exp(-d) - 1)      |d| <= 1
    far_teacher     sum exp(t - t_max)            |d| > 1
    moment          reverse KL: sum exp(s) k(d) where |d| <= 1, else sum exp(s) d
                    forward KL: sum exp(t - t_max) k(-d) where |d| <= 1, else -sum exp(t - t_max) d
    student_moment  sum exp(s) s
    teacher_moment  sum exp(t - t_max) (t - t_max)

A new centre changes s by -rise, d by -shift and t - t_max by -teacher_rise, the same for every column, so each sum
becomes a combination of the old ones: without cancellation where |shift| <= 1, and beyond that all old columns count
as far.
"""

import triton
import triton.language as tl

from opsd_kernels.divergence import KINDS
from opsd_kernels.rows import APART as APART_
from opsd_kernels.triton_math import exp_remainder, ln_one_plus, log_remainder, times

REVERSE_KL = tl.constexpr(KINDS.index("reverse_kl"))
FORWARD_KL = tl.constexpr(KINDS.index("forward_kl"))
JSD = tl.constexpr(KINDS.index("jsd"))
APART = tl.constexpr(APART_)
ROUNDED = tl.constexpr(60.0)  # beyond it the roundings of z_s - z_t over a low temperature have left no digits
# Partial results of a program, each `splits` floats apart in (rows, PARTS, splits):
# 0-3 state, 4-10 sums, 11-16 terms, 17-18 logits of the sampled token (first program only)
PARTS = 19
SUMS = tl.constexpr(4)
TERMS = tl.constexpr(11)
TOKEN = tl.constexpr(17)


@triton.jit
def finite(x):
    """0 in place of -inf."""
    return tl.where(x == float("-inf"), 0.0, x)


@triton.jit
def teacher_at(top, teacher_top, delta: tl.constexpr):
    """ref for a teacher logit."""
    return tl.where(teacher_top == float("-inf"), 0.0, finite(top) - teacher_top if delta else teacher_top)


@triton.jit
def settled(top, ref, teacher_top, apart, inverse_t, furthest, delta: tl.constexpr):
    """The state; ref counts where apart is 0."""
    here = finite(top) - ref if delta else ref
    apart = tl.where((teacher_top - here) * inverse_t <= furthest, apart, 1.0)  # 1 of a teacher that is all -inf
    return top, tl.where(apart > 0.0, teacher_at(top, teacher_top, delta), ref), teacher_top, apart


@triton.jit
def peak(state, delta: tl.constexpr):
    """t_max before the temperature: subtracted there, the greatest t - t_max is 0, whatever is fused."""
    top, ref, teacher_top, apart = state
    return tl.where(apart > 0.0, 0.0, teacher_top - (finite(top) - ref if delta else ref))


@triton.jit
def moved(sums, old, new, inverse_t, kind: tl.constexpr, delta: tl.constexpr):
    """The sums around another state."""
    near, far, growth, far_teacher, moment, student_moment, teacher_moment = sums
    rise = (new[0] - finite(old[0])) * inverse_t
    rise = tl.where(old[0] == float("-inf"), 0.0, rise)
    teacher_rise = tl.where(old[2] == float("-inf"), 0.0, (new[2] - finite(old[2])) * inverse_t)
    ref_rise = new[1] - old[1]
    shift = (ref_rise if delta else finite(new[0]) - finite(old[0]) - ref_rise) * inverse_t
    unit = tl.exp(-peak(old, delta) * inverse_t)
    stays = tl.abs(shift) <= 1.0
    x = tl.where(stays, shift, 0.0)
    remainder = exp_remainder(-x)
    up = x + remainder  # exp(x) - 1
    student = near + far
    teacher = unit * (near + growth) + far_teacher
    scale, teacher_scale = tl.exp(-rise), tl.exp(-teacher_rise)
    if kind == REVERSE_KL:
        moment += tl.where(stays, up * growth + remainder * near - x * far, -growth - shift * student)
        moment = times(scale, moment)
    elif kind == FORWARD_KL:
        kept = unit * (exp_remainder(x) * near + x * growth) + x * far_teacher
        moment += tl.where(stays, kept, unit * growth + shift * teacher)
        moment = times(teacher_scale, moment)
    return (
        scale * tl.where(stays, near, 0.0),
        scale * tl.where(stays, far, student),
        scale * tl.where(stays, growth + up * (growth + near), 0.0),
        teacher_scale * tl.where(stays, far_teacher, teacher),
        moment,
        scale * (student_moment - rise * student),
        teacher_scale * (teacher_moment - teacher_rise * teacher),
    )


@triton.jit
def _part(parts, row, i, splits: tl.constexpr, count: tl.constexpr):
    return tl.load(parts + row * count * splits + i * splits + tl.arange(0, splits))


@triton.jit
def total(parts, row, i, splits: tl.constexpr, count: tl.constexpr):
    """Sum of a partial result over the programs of a row."""
    return tl.sum(_part(parts, row, i, splits, count), 0)


@triton.jit
def merge(parts, row, inverse_t, furthest, kind: tl.constexpr, delta: tl.constexpr, splits: tl.constexpr,
          count: tl.constexpr):  # fmt: skip
    """Centre (top, ref, peak, apart) and sums of a whole row."""
    old = (
        _part(parts, row, 0, splits, count),
        _part(parts, row, 1, splits, count),
        _part(parts, row, 2, splits, count),
        _part(parts, row, 3, splits, count),
    )
    lane = tl.arange(0, splits)
    top, teacher_top = tl.max(old[0], 0), tl.max(old[2], 0)
    first = lane == tl.min(tl.where(old[0] == top, lane, splits - 1), 0)
    apart = tl.sum(tl.where(first, old[3], 0.0), 0)
    new = settled(top, tl.sum(tl.where(first, old[1], 0.0), 0), teacher_top, apart, inverse_t, furthest, delta)
    sums = (
        _part(parts, row, SUMS, splits, count),
        _part(parts, row, SUMS + 1, splits, count),
        _part(parts, row, SUMS + 2, splits, count),
        _part(parts, row, SUMS + 3, splits, count),
        _part(parts, row, SUMS + 4, splits, count),
        _part(parts, row, SUMS + 5, splits, count),
        _part(parts, row, SUMS + 6, splits, count),
    )
    s = moved(sums, old, new, inverse_t, kind, delta)
    sums = (tl.sum(s[0], 0), tl.sum(s[1], 0), tl.sum(s[2], 0), tl.sum(s[3], 0), tl.sum(s[4], 0), tl.sum(s[5], 0),
            tl.sum(s[6], 0))  # fmt: skip
    if delta:
        sums = _with_maximum(sums, tl.exp(-peak(new, delta) * inverse_t), teacher_top)
    return (finite(top), new[1], peak(new, delta), new[3]), sums


@triton.jit
def _with_maximum(sums, unit, teacher_top):
    """With the teacher's maximum, which alone is 1, where nothing of it is ROUNDED; a row that is all -inf has none."""
    near, far, growth, far_teacher, moment, student_moment, teacher_moment = sums
    rest = unit * (near + growth)
    lost = (rest + far_teacher < tl.exp(-ROUNDED)) & (teacher_top > float("-inf"))
    return near, far, growth, tl.where(lost, 1.0 - rest, far_teacher), moment, student_moment, teacher_moment


@triton.jit
def normalisers(sums, t_max, kind: tl.constexpr):
    """S, Q in units of exp(t_max), c = ln(Q / S), and of the two KLs the value and, reverse, the mean sum p d."""
    near, far_student, growth, far_teacher, moment = sums[0], sums[1], sums[2], sums[3], sums[4]
    unit = tl.exp(-t_max)
    student = near + far_student
    teacher = unit * (near + growth) + far_teacher
    far = far_teacher * tl.exp(t_max) - far_student
    ratio = (growth + far) / student  # Q / S - 1
    fits = (ratio > -0.99) & (t_max <= APART)  # else 1 + ratio has next to no digits, or exp(t_max) is too large
    c = tl.where(fits, ln_one_plus(ratio), t_max + tl.log(teacher / student))
    # where Q is close to S, first-order terms are cancelled before they are summed
    close = tl.abs(ratio) <= 0.25
    value, mean = c * 0.0, c * 0.0
    if kind == REVERSE_KL:
        mean = (moment - growth) / student
        fine = (moment + far) / student - log_remainder(tl.where(close, ratio, 0.0))
        value = tl.where(close, fine, mean + c)
        mean = tl.where(value == value, mean, value)  # NaN also of a NaN that has no mass
    elif kind == FORWARD_KL:
        back = tl.where(close, -(growth + far) / (student + growth + far), 0.0)  # S / Q - 1
        fine = (moment - unit * far) / teacher - log_remainder(back)
        value = tl.where(close, fine, (moment + unit * growth) / teacher - c)
    return student, teacher, c, value, mean
