# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton, first pass over a row: centre and sums together, read once. Plan: rows_triton.py."""

import triton
import triton.language as tl

from opsd_kernels.triton_math import exp_remainder, times
from opsd_kernels.triton_sums import FORWARD_KL, REVERSE_KL, ROUNDED, SUMS, TOKEN, moved, peak, settled


@triton.jit
def segment(vocab, tile: tl.constexpr, splits: tl.constexpr):
    """First and last column of this program."""
    size = tl.cdiv(tl.cdiv(vocab, tile), splits) * tile
    begin = tl.program_id(1) * size
    return begin, tl.minimum(begin + size, vocab)


@triton.jit
def logits(z_s, second, row, stride, column, end):
    """A tile of both rows; -inf beyond the end."""
    x = tl.load(z_s + row * stride + column, mask=column < end, other=float("-inf"))
    return x, tl.load(second + row * stride + column, mask=column < end, other=float("-inf"))


@triton.jit
def centred(x, y, inside, centre, inverse_t, delta: tl.constexpr):
    """s, t - t_max, d, exp(s), exp(t - t_max) of a tile; centre is (top, ref, peak, ...)."""
    student = x - centre[0]
    other = y - centre[1]
    s = student * inverse_t
    d = (other if delta else student - other) * inverse_t  # subtracted first: equal rows give 0, whatever is fused
    t = ((student - other if delta else other) - centre[2]) * inverse_t
    if delta:
        t = tl.where(t > ROUNDED, ROUNDED, t)
    t = tl.where(inside, t, float("-inf"))
    return s, t, d, tl.exp(s), tl.exp(t)


@triton.jit
def _terms(s, t, d, e_s, e_t, unit, kind: tl.constexpr):
    """What a column adds to each of the sums."""
    near = tl.abs(d) <= 1.0  # false for inf - inf, whose terms are 0 on the far side
    d_near = tl.where(near, d, 0.0)
    e_near = tl.where(near, e_s, 0.0)
    k = exp_remainder(d_near)
    moment = e_near * 0.0
    if kind == REVERSE_KL:
        moment = tl.where(near, e_near * k, times(e_s, d))
    elif kind == FORWARD_KL:
        k_back = d_near * d_near - k * (1.0 + d_near)  # exp(-d) k(-d)
        moment = tl.where(near, unit * e_near * k_back, -times(e_t, d))
    return (
        e_near,
        tl.where(near, 0.0, e_s),
        e_near * (k - d_near),
        tl.where(near, 0.0, e_t),
        moment,
        e_s * tl.maximum(s, -1e4),  # 0 where s is -inf
        e_t * tl.maximum(t, -1e4),
    )


@triton.jit
def _raised(state, x, y, teacher, column, second, inverse_t, furthest, delta: tl.constexpr):
    """The state (top, ref, teacher_top, apart) after a tile: at the greatest student logit so far."""
    top, ref, teacher_top, apart = state
    best = tl.max(x, 0)
    teacher_best = tl.maximum(teacher_top, tl.max(teacher, 0))
    rises = best > top
    a = tl.min(tl.where(x == best, column, 2147483647), 0)
    at = tl.load(second + a, mask=rises, other=0.0)
    best = tl.where(rises, best, top)
    ref, apart = tl.where(rises, at, ref), tl.where(rises, 0.0, apart)
    return settled(best, ref, teacher_best, apart, inverse_t, furthest, delta)


@triton.jit
def statistics_kernel(z_s, second, tokens, parts, vocab, stride, inverse_t, furthest, kind: tl.constexpr,
                      delta: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr, lanes: tl.constexpr,
                      splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    """Sums around the greatest student logit so far, moved whenever a tile has a greater one."""
    row = tl.program_id(0).to(tl.int64)
    begin, end = segment(vocab, tile, splits)
    lane = tl.arange(0, tile)
    lowest = tl.full([], float("-inf"), tl.float32)
    one = tl.full([], 1.0, tl.float32)
    state = (lowest, one * 0.0, lowest, one)
    zero = tl.zeros([lanes], tl.float32)
    sums = (zero, zero, zero, zero, zero, zero, zero)
    for start in tl.range(begin, end, tile, num_stages=stages):
        column = start + lane
        x, y = logits(z_s, second, row, stride, column, end)
        teacher = tl.where(column < end, x - y, float("-inf")) if delta else y
        higher = (x > state[0]) | (teacher > state[2])
        if tl.max(higher.to(tl.int32), 0) > 0:
            new = _raised(state, x, y, teacher, column, second + row * stride, inverse_t, furthest, delta)
            sums = moved(sums, state, new, inverse_t, kind, delta)
            state = new
        centre = (tl.where(state[0] == float("-inf"), 0.0, state[0]), state[1], peak(state, delta))
        s, t, d, e_s, e_t = centred(x, y, column < end, centre, inverse_t, delta)
        new_terms = _terms(s, t, d, e_s, e_t, tl.exp(-centre[2] * inverse_t), kind)
        sums = _added(sums, new_terms, tile, lanes)
    mine = parts + row * count * splits + tl.program_id(1)
    for i in tl.static_range(4):
        tl.store(mine + i * splits, state[i])
    for i in tl.static_range(7):
        tl.store(mine + (SUMS + i) * splits, tl.sum(sums[i], 0))
    if tokens is not None:
        token = tl.load(tokens + row)
        if (tl.program_id(1) == 0) & (token >= 0) & (token < vocab):
            tl.store(mine + TOKEN * splits, tl.load(z_s + row * stride + token))
            tl.store(mine + (TOKEN + 1) * splits, tl.load(second + row * stride + token))


@triton.jit
def _fold(x, tile: tl.constexpr, lanes: tl.constexpr):
    """(tile,) -> (lanes,), inside each thread."""
    return tl.sum(tl.reshape(x, [tile // lanes, lanes]), 0)


@triton.jit
def _added(sums, terms, tile: tl.constexpr, lanes: tl.constexpr):
    return (
        sums[0] + _fold(terms[0], tile, lanes),
        sums[1] + _fold(terms[1], tile, lanes),
        sums[2] + _fold(terms[2], tile, lanes),
        sums[3] + _fold(terms[3], tile, lanes),
        sums[4] + _fold(terms[4], tile, lanes),
        sums[5] + _fold(terms[5], tile, lanes),
        sums[6] + _fold(terms[6], tile, lanes),
    )
