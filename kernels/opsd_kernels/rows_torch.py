"""Row kernel in plain torch: the fallback of the C++ library and its readable twin. Equations: divergence.py.

Both rows are centred at the student's argmax a, d = (z_s - z_s[a]) - (z_t - z_t[a]), so that the signal of
self-distillation, the small difference of two large logits, is formed before anything is exponentiated. Then
c = ln(sum p exp(-d)), r = ln p - ln q = d + c, and every value is a sum of terms that cannot be negative:
reverse sum p r + (q - p), forward -sum q r + (q - p), jsd with x = q - p likewise (sum x = 0 adds nothing).
Where the teacher is apart, d and c around a would be huge on columns that both sides share, and r their small
difference: there the teacher is centred at its own maximum.

Whatever is reduced over a row goes through Columns: the rows here may be slices of longer ones (rows_parallel.py).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from opsd_kernels.chunking import MIB
from opsd_kernels.divergence import Divergence
from opsd_kernels.rows import APART, RowOutputs, apart_from

NAME = "torch"
SLAB = 1 << 18  # elements handled at once: bounds the temporaries, yet few enough slabs for torch's threads
TEMPORARIES = 20  # of one slab, at most


class Columns(Protocol):
    """The columns of the vocabulary that the rows hold, and reductions over all of it."""

    @property
    def start(self) -> int: ...

    def centre(self, *tops: Tensor) -> list[Tensor]:
        """Of (n, 1) tensors that belong to each slice: all of the slice with the largest first one."""

    def max(self, x: Tensor) -> Tensor: ...  # (n, V) -> (n, 1)

    def sum(self, *xs: Tensor) -> list[Tensor]: ...  # each (n, V) -> (n, 1)


class WholeRow:
    """Every column is here."""

    start = 0

    def centre(self, *tops: Tensor) -> list[Tensor]:
        return list(tops)

    def max(self, x: Tensor) -> Tensor:
        return x.amax(-1, keepdim=True)

    def sum(self, *xs: Tensor) -> list[Tensor]:
        return [x.sum(-1, keepdim=True) for x in xs]


WHOLE = WholeRow()


def scratch_bytes(vocab: int) -> int:
    """Upper bound of the temporaries of one slab."""
    return TEMPORARIES * 4 * max(SLAB, vocab)


def slab_elements(workspace_mib: float) -> int:
    """Larger slabs, for what pays for each of them: a quarter of the workspace holds the temporaries."""
    return min(int(workspace_mib * MIB) // 4 // (4 * TEMPORARIES), 1 << 22)


def slabs(rows: int, vocab: int, elements: int) -> Iterator[slice]:
    step = max(1, elements // max(1, vocab))
    return (slice(i, min(i + step, rows)) for i in range(0, rows, step))


def run(
    z_s: Tensor,  # (n, V) fp32, consumed
    z_t: Tensor,  # (n, V) fp32, consumed; holds z_s - z_t when is_delta
    is_delta: bool,
    divergence: Divergence,
    scale: Tensor,  # (n,) fp32 weight of each row's gradient
    grad: Tensor | None,  # (n, V), may be z_s
    out: RowOutputs,
    tokens: Tensor | None = None,  # (n,) int64
) -> None:
    """Fill `out` and, unless None, grad = scale * d value / d (z_s / temperature)."""
    for rows in slabs(len(z_s), z_s.shape[1], SLAB):
        target, sampled = (None if x is None else x[rows] for x in (grad, tokens))
        slab(Rows(z_s[rows], z_t[rows], is_delta), divergence, scale[rows], target, out.rows(rows), sampled)


class Rows(NamedTuple):
    """Logits as a row kernel gets them."""

    z_s: Tensor  # (n, V)
    second: Tensor  # (n, V) z_t, or z_s - z_t when is_delta
    is_delta: bool


class Centred(NamedTuple):
    """Both sides over the temperature, less their logits at the student's maximum a."""

    s: Tensor  # (n, V)
    t: Tensor  # (n, V)
    d: Tensor  # (n, V) s - t, to its own precision
    t_low: Tensor  # (n, V) t - t_max, to its own precision
    t_max: Tensor  # (n, 1)
    s_at: Tensor  # (n, 1) what was subtracted
    t_at: Tensor  # (n, 1)
    apart: Tensor  # (n, 1) the teacher is centred at its own maximum


def centred(rows: Rows, inverse: float, furthest: float, columns: Columns = WHOLE) -> Centred:
    z_s, second, is_delta = rows
    top = z_s.argmax(dim=-1, keepdim=True)
    teacher_top = columns.max(z_s - second if is_delta else second)
    z_top, second_top = columns.centre(z_s.gather(1, top), second.gather(1, top))
    apart = (teacher_top - (z_top - second_top if is_delta else second_top)) * inverse > furthest
    second_top = torch.where(apart, z_top - teacher_top if is_delta else teacher_top, second_top)
    student, other = z_s - z_top, second - second_top
    t_at = (z_top - second_top if is_delta else second_top) * inverse
    d = (other if is_delta else student - other) * inverse
    t = student - other if is_delta else other
    peak = columns.max(t)
    t_low = (t - peak) * inverse
    return Centred(student * inverse, t * inverse, d, t_low, peak * inverse, z_top * inverse, t_at, apart)


def slab(
    rows: Rows,
    divergence: Divergence,
    scale: Tensor,  # (n,)
    grad: Tensor | None,  # (n, V)
    out: RowOutputs,
    tokens: Tensor | None,  # (n,)
    columns: Columns = WHOLE,
) -> None:
    inverse, furthest = 1.0 / divergence.temperature, apart_from(divergence)
    s, _, d, t_low, t_max, s_at, t_at, apart = centred(rows, inverse, furthest, columns)
    e_s, e_t = s.exp(), t_low.exp()
    # sum of exp(t) - exp(s): expm1 where the two are close, their plain difference where expm1 could overflow
    difference = torch.where(d.abs() <= 1, e_s * torch.expm1(-d), e_t * t_max.exp() - e_s)
    *sampled, owned = _sampled(tokens, columns, s, t_low)
    sum_s, sum_t, excess, at_s, at_t, logit_s, logit_t, known = columns.sum(
        *(e_s, e_t, difference, times(e_s, s), times(e_t, t_low)), *sampled, owned
    )
    out["top1_agreement"].copy_(((t_max <= 0) & ~apart)[:, 0])
    for side, total, weighted, centre, logit in (
        ("student", sum_s, at_s, s_at, logit_s),
        ("teacher", sum_t, at_t, t_at + t_max, logit_t),
    ):
        out[f"{side}_entropy"].copy_((total.log() - weighted / total)[:, 0])
        out[f"{side}_lse"].copy_((centre + total.log())[:, 0])
        log_p = torch.where(known > 0, logit - total.log(), torch.nan)[:, 0]
        out[f"{side}_logprob"].copy_(torch.zeros_like(log_p) if tokens is None else log_p.masked_fill(tokens < 0, 0))

    fits = (t_max < APART) & (excess > -0.99 * sum_s)  # else 1 + ratio has few digits, or exp(t_max) is too large
    c = torch.where(fits, torch.log1p(excess / sum_s), t_max + (sum_t / sum_s).log())
    r = d + c
    p, q = e_s / sum_s, e_t / sum_t
    x = torch.where(r.abs() <= 1, p * torch.expm1(-r), q - p)  # q - p
    limit = math.inf if divergence.clip is None else divergence.clip
    value, slope, lost = _FORMULAS[divergence.kind](Terms(p, q, d, r, x), divergence.beta, limit, columns)
    out["value"].copy_((value.clamp_min(0) if divergence.clip is None else value)[:, 0])
    out["clip_fraction"].copy_(lost[:, 0])
    if grad is not None:
        grad.copy_(times(scale[:, None], slope))


def _sampled(tokens: Tensor | None, columns: Columns, *logits: Tensor) -> list[Tensor]:
    """Each logit at the sampled token, 0 where another slice holds it, and whether this one does: (n, 1) each."""
    if tokens is None:
        return [torch.zeros_like(x[:, :1]) for x in (*logits, logits[0])]
    at, width = tokens[:, None] - columns.start, logits[0].shape[1]
    owned = (at >= 0) & (at < width)
    return [*(torch.where(owned, x.gather(1, at.clamp(0, width - 1)), 0.0) for x in logits), owned.float()]


def times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, with 0 * inf = 0: a column without mass says nothing. A NaN weight stays NaN."""
    return torch.where(weight == 0, 0.0, weight * x)


# Each formula gives the value, the gradient and the student's mass on clipped columns. Where none is clipped the value
# is the sum that cannot be negative; sums of the gradient are over kept columns, whatever is infinite elsewhere.
Formula = tuple[Tensor, Tensor, Tensor]


class Terms(NamedTuple):
    p: Tensor  # (n, V)
    q: Tensor
    d: Tensor  # r but for a constant of the row
    r: Tensor  # ln p - ln q
    x: Tensor  # q - p


def _reverse_kl(terms: Terms, beta: float, limit: float, columns: Columns) -> Formula:
    p, _, d, r, x = terms
    f = times(p, r)
    if limit == math.inf:
        value, mean = columns.sum(f + x, times(p, d))
        mean = torch.where(value.isnan(), value, mean)  # NaN also of a NaN that has no mass
        return value, times(p, d - mean), torch.zeros_like(value)  # r - KL, but of smaller numbers
    clipped = f > limit
    mass = torch.where(clipped, p, 0.0)
    cut, free, kept, lost, kept_mass, count = columns.sum(
        *(f.clamp(max=limit), f + x, torch.where(clipped, 0.0, f), mass, p - mass, clipped.float())
    )
    value = torch.where(count > 0, cut, free)
    shift = torch.where(lost > 0, kept - lost, value)
    return value, times(p, torch.where(clipped, -kept - kept_mass, r - shift)), lost


def _forward_kl(terms: Terms, beta: float, limit: float, columns: Columns) -> Formula:
    p, q, _, r, x = terms
    f = -times(q, r)
    clipped = f > limit
    mass = torch.where(clipped, q, 0.0)
    cut, free, kept, lost, count, lost_p = columns.sum(
        *(f.clamp(max=limit), f - x, q - mass, mass, clipped.float(), torch.where(clipped, p, 0.0))
    )
    value = torch.where(count > 0, cut, free)
    below = torch.where(lost > 0.5, p * kept - q, -x - p * lost)  # equal; the one that keeps its digits
    return value, torch.where(clipped, p * kept, below), lost_p


def _jsd(terms: Terms, beta: float, limit: float, columns: Columns) -> Formula:
    p, q, _, r, x = terms
    y = torch.expm1(-r.abs())
    # g = ln(M/p) and h = ln(q/M), each from the side on which exp cannot overflow
    less, more = torch.log1p(beta * y), torch.log1p((1 - beta) * y)
    g = torch.where(r >= 0, less, more - r)
    h = torch.where(r >= 0, -r - less, -more)
    student = beta * x - times(p, g)  # sums to KL(p||M)
    teacher = times(q, h) - (1 - beta) * x  # sums to KL(q||M)
    f = beta * teacher + (1 - beta) * student  # x cancels in every one of them
    clipped = f > limit
    parts = student if limit == math.inf else -torch.where(clipped, 0.0, times(p, g))
    value, to_mixture, lost = columns.sum(f.clamp(max=limit), parts, torch.where(clipped, p, 0.0))
    return value, (1 - beta) * times(p, torch.where(clipped, 0.0, -g) - to_mixture), lost


_FORMULAS = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}
