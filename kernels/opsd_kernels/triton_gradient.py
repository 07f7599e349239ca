# mypy: allow-untyped-defs, allow-incomplete-defs
"""Triton, last part of a row: results and gradient. Plan: rows_triton.py."""

import triton
import triton.language as tl

from opsd_kernels.rows import RESULTS
from opsd_kernels.triton_math import times
from opsd_kernels.triton_stats import centred, logits, segment
from opsd_kernels.triton_sums import FORWARD_KL, JSD, REVERSE_KL, TOKEN, merge, normalisers
from opsd_kernels.triton_terms import merge_terms, term

VALUE = tl.constexpr(RESULTS.index("value"))
STUDENT_ENTROPY = tl.constexpr(RESULTS.index("student_entropy"))
TEACHER_ENTROPY = tl.constexpr(RESULTS.index("teacher_entropy"))
STUDENT_LSE = tl.constexpr(RESULTS.index("student_lse"))
TEACHER_LSE = tl.constexpr(RESULTS.index("teacher_lse"))
TOP1_AGREEMENT = tl.constexpr(RESULTS.index("top1_agreement"))
STUDENT_LOGPROB = tl.constexpr(RESULTS.index("student_logprob"))
TEACHER_LOGPROB = tl.constexpr(RESULTS.index("teacher_logprob"))
CLIP_FRACTION = tl.constexpr(RESULTS.index("clip_fraction"))


@triton.jit
def _slope(p, q, r, part, kept, lost, beta, clip, clips: tl.constexpr, kind: tl.constexpr):
    """d value / d (z_s / T); without a clip part is the mean of r or of ln(p/M), over p."""
    f, _safe, _student, x = term(p, q, r, beta, kind)
    if kind == FORWARD_KL:
        below = tl.where(lost > 0.5, p * kept - q, x - p * lost)  # equal; the one that keeps its digits
        return tl.where(f > clip, p * kept, below) if clips else x
    if kind == JSD:
        x = tl.where(f > clip, 0.0, x) if clips else x
        return times(p, x - part) * (1.0 - beta)
    if clips:
        return times(p, tl.where(f > clip, -(part + kept), x - (part - lost)))
    return times(p, x - part)


@triton.jit
def _by_products(parts, tokens, out, row, out_stride, vocab, centre, sums, student, teacher, inverse_t,
                 delta: tl.constexpr, splits: tl.constexpr, count: tl.constexpr):  # fmt: skip
    """Everything but the value into out (RESULTS, n)."""
    top, ref, peak, apart = centre
    log_student, log_teacher = tl.log(student), tl.log(teacher)
    mine = out + row
    tl.store(mine + STUDENT_ENTROPY * out_stride, log_student - sums[5] / student)
    tl.store(mine + TEACHER_ENTROPY * out_stride, log_teacher - sums[6] / teacher)
    tl.store(mine + STUDENT_LSE * out_stride, top * inverse_t + log_student)
    tl.store(mine + TEACHER_LSE * out_stride, ((top - ref if delta else ref) + peak) * inverse_t + log_teacher)
    tl.store(mine + TOP1_AGREEMENT * out_stride, tl.where((apart == 0.0) & (peak <= 0.0), 1.0, 0.0))
    log_p, log_q = peak * 0.0, peak * 0.0
    if tokens is not None:
        token = tl.load(tokens + row)
        x = tl.load(parts + (row * count + TOKEN) * splits) - top
        y = tl.load(parts + (row * count + TOKEN + 1) * splits) - ref
        inside = token < vocab
        t = ((x - y if delta else y) - peak) * inverse_t
        log_p = tl.where(token < 0, 0.0, tl.where(inside, x * inverse_t - log_student, float("nan")))
        log_q = tl.where(token < 0, 0.0, tl.where(inside, t - log_teacher, float("nan")))
    tl.store(mine + STUDENT_LOGPROB * out_stride, log_p)
    tl.store(mine + TEACHER_LOGPROB * out_stride, log_q)


@triton.jit
def gradient_kernel(z_s, second, tokens, parts, scale, grad, out, vocab, stride, grad_stride, out_stride, inverse_t,
                    furthest, beta, clip, clips: tl.constexpr, with_grad: tl.constexpr, kind: tl.constexpr,
                    delta: tl.constexpr, tile: tl.constexpr, stages: tl.constexpr, splits: tl.constexpr,
                    count: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    centre, sums = merge(parts, row, inverse_t, furthest, kind, delta, splits, count)
    student, teacher, c, value, part = normalisers(sums, centre[2] * inverse_t, kind)
    kept, lost, student_lost = student * 0.0, student * 0.0, student * 0.0  # the value may be infinite
    if clips or kind == JSD:
        value, part, kept, lost, student_lost = merge_terms(parts, row, clips, kind, splits, count)
    if tl.program_id(1) == 0:
        floor = value if clips and kind != JSD else 0.0  # clipped terms may sum to less than 0
        tl.store(out + VALUE * out_stride + row, tl.where(value < 0.0, floor, value))
        tl.store(out + CLIP_FRACTION * out_stride + row, student_lost)
        _by_products(parts, tokens, out, row, out_stride, vocab, centre, sums, student, teacher, inverse_t, delta,
                     splits, count)  # fmt: skip
    if with_grad:
        begin, end = segment(vocab, tile, splits)
        factor = tl.load(scale + row)
        per_student, per_teacher = 1.0 / student, 1.0 / teacher
        lane = tl.arange(0, tile)
        for start in tl.range(begin, end, tile, num_stages=stages):
            column = start + lane
            x, y = logits(z_s, second, row, stride, column, end)
            _s, _t, d, e_s, e_t = centred(x, y, column < end, centre, inverse_t, delta)
            # of an unclipped reverse KL r - KL = d - sum p d, smaller numbers
            r = d if kind == REVERSE_KL and not clips else d + c
            slope = _slope(e_s * per_student, e_t * per_teacher, r, part, kept, lost, beta, clip, clips, kind)
            tl.store(grad + row * grad_stride + column, times(factor, slope), mask=column < end)
