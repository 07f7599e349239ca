"""Row kernel in plain torch: the fallback of the C++ library and its readable twin. Equations: divergence.py.

Both rows are centred at the student's argmax a, d = (z_s - z_s[a]) - (z_t - z_t[a]), so that the signal of
self-distillation, the small difference of two large logits, is formed before anything is exponentiated. Then
c = ln(sum p exp(-d)), r = ln p - ln q = d + c, and every value is a sum of terms that cannot be negative:
reverse sum p r + (q - p), forward -sum q r + (q - p), jsd with x = q - p likewise (sum x = 0 adds nothing).
"""

import math

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence
from opsd_kernels.rows import RowOutputs

NAME = "torch"
SLAB = 1 << 18  # elements handled at once: bounds the temporaries, yet few enough slabs for torch's threads


def scratch_bytes(vocab: int) -> int:
    """Upper bound of the temporaries of one slab."""
    return 20 * 4 * max(SLAB, vocab)


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
    step = max(1, SLAB // max(1, z_s.shape[1]))
    for i in range(0, z_s.shape[0], step):
        s = slice(i, min(i + step, z_s.shape[0]))
        target, sampled = (None if x is None else x[s] for x in (grad, tokens))
        _slab(z_s[s], z_t[s], is_delta, divergence, scale[s], target, out.rows(s), sampled)


def _slab(
    z_s: Tensor,
    z_t: Tensor,
    is_delta: bool,
    divergence: Divergence,
    scale: Tensor,
    grad: Tensor | None,
    out: RowOutputs,
    tokens: Tensor | None,
) -> None:
    inverse = 1.0 / divergence.temperature
    top = z_s.argmax(dim=-1, keepdim=True)
    z_top, second_top, excluded = _centre(z_s, z_t, is_delta, top)
    student, other = z_s - z_top, z_t - second_top
    s = student * inverse
    d = (other if is_delta else student - other) * inverse
    t = (student - other if is_delta else other) * inverse
    t_max = t.amax(dim=-1, keepdim=True)
    e_s, e_t = s.exp(), (t - t_max).exp()
    sum_s, sum_t = e_s.sum(-1, keepdim=True), e_t.sum(-1, keepdim=True)
    p, q = e_s / sum_s, e_t / sum_t
    _by_products("student", s, p, sum_s, z_top * inverse, out, tokens)
    _by_products(
        "teacher", t - t_max, q, sum_t, (z_top - second_top if is_delta else second_top) * inverse + t_max, out, tokens
    )
    out["top1_agreement"].copy_(((t_max <= 0) & ~excluded)[:, 0])

    # sum of exp(t) - exp(s): expm1 where the two are close, their plain difference where expm1 could overflow
    difference = torch.where(d.abs() <= 1, e_s * torch.expm1(-d), e_t * t_max.clamp(max=30).exp() - e_s)
    near = torch.log1p(difference.sum(-1, keepdim=True) / sum_s)
    c = torch.where(t_max < 30, near, t_max + (sum_t / sum_s).log())
    r = d + c
    x = torch.where(r.abs() <= 1, p * torch.expm1(-r), q - p)  # q - p
    limit = math.inf if divergence.clip is None else divergence.clip
    value, slope, lost = _FORMULAS[divergence.kind](p, q, r, x, divergence.beta, limit)
    out["value"].copy_((value.clamp_min(0) if divergence.clip is None else value)[:, 0])
    out["clip_fraction"].copy_(lost[:, 0])
    if grad is not None:
        grad.copy_(_times(scale[:, None], slope))


def _centre(z_s: Tensor, z_t: Tensor, is_delta: bool, top: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Both rows at the student's argmax; where the teacher excludes it (-inf), the teacher at its own maximum."""
    z_top, second_top = z_s.gather(1, top), z_t.gather(1, top)
    excluded = (z_top - second_top if is_delta else second_top) == -torch.inf
    teacher_top = (z_s - z_t if is_delta else z_t).amax(dim=-1, keepdim=True)
    instead = z_top - teacher_top if is_delta else teacher_top
    return z_top, torch.where(excluded, instead, second_top), excluded


def _by_products(
    side: str,
    centred: Tensor,  # (n, V) logits / temperature - centre
    p: Tensor,
    total: Tensor,  # sum of exp(centred), (n, 1)
    centre: Tensor,
    out: RowOutputs,
    tokens: Tensor | None,
) -> None:
    log_total = total.log()
    out[f"{side}_entropy"].copy_((log_total - _times(p, centred).sum(-1, keepdim=True))[:, 0])
    out[f"{side}_lse"].copy_((centre + log_total)[:, 0])
    if tokens is None:
        out[f"{side}_logprob"].zero_()
        return
    at = tokens[:, None]
    log_p = centred.gather(1, at.clamp(0, centred.shape[1] - 1)) - log_total
    log_p = torch.where(at < 0, 0.0, torch.where(at < centred.shape[1], log_p, torch.nan))
    out[f"{side}_logprob"].copy_(log_p[:, 0])


def _times(weight: Tensor, x: Tensor) -> Tensor:
    """weight * x, with 0 * inf = 0: a column without mass says nothing. A NaN weight stays NaN."""
    return torch.where(weight == 0, 0.0, weight * x)


# Each formula gives the value, the gradient and the student's mass on clipped columns. Where none is clipped the value
# is the sum that cannot be negative; sums of the gradient are over kept columns, whatever is infinite elsewhere.
Formula = tuple[Tensor, Tensor, Tensor]


def _reverse_kl(p: Tensor, q: Tensor, r: Tensor, x: Tensor, beta: float, limit: float) -> Formula:
    f = _times(p, r)
    clipped = f > limit
    value = torch.where(clipped.any(-1, keepdim=True), _sum(f.clamp(max=limit)), _sum(f + x))
    kept, lost = _sum(torch.where(clipped, 0.0, f)), _sum(torch.where(clipped, p, 0.0))
    shift = torch.where(lost > 0, kept - lost, value)
    slope = torch.where(clipped, -kept - _sum(torch.where(clipped, 0.0, p)), r - shift)
    return value, _times(p, slope), lost


def _forward_kl(p: Tensor, q: Tensor, r: Tensor, x: Tensor, beta: float, limit: float) -> Formula:
    f = -_times(q, r)
    clipped = f > limit
    value = torch.where(clipped.any(-1, keepdim=True), _sum(f.clamp(max=limit)), _sum(f - x))
    kept, lost = _sum(torch.where(clipped, 0.0, q)), _sum(torch.where(clipped, q, 0.0))
    below = torch.where(lost > 0.5, p * kept - q, -x - p * lost)  # equal; the one that keeps its digits
    return value, torch.where(clipped, p * kept, below), _sum(torch.where(clipped, p, 0.0))


def _jsd(p: Tensor, q: Tensor, r: Tensor, x: Tensor, beta: float, limit: float) -> Formula:
    y = torch.expm1(-r.abs())
    # g = ln(M/p) and h = ln(q/M), each from the side on which exp cannot overflow
    less, more = torch.log1p(beta * y), torch.log1p((1 - beta) * y)
    g = torch.where(r >= 0, less, more - r)
    h = torch.where(r >= 0, -r - less, -more)
    student = beta * x - _times(p, g)  # sums to KL(p||M)
    teacher = _times(q, h) - (1 - beta) * x  # sums to KL(q||M)
    f = beta * teacher + (1 - beta) * student  # x cancels in every one of them
    clipped = f > limit
    to_mixture = _sum(student) if limit == math.inf else -_sum(torch.where(clipped, 0.0, _times(p, g)))
    slope = (1 - beta) * _times(p, torch.where(clipped, 0.0, -g) - to_mixture)
    return _sum(f.clamp(max=limit)), slope, _sum(torch.where(clipped, p, 0.0))


def _sum(x: Tensor) -> Tensor:  # (n, V) -> (n, 1)
    return x.sum(-1, keepdim=True)


_FORMULAS = {"reverse_kl": _reverse_kl, "forward_kl": _forward_kl, "jsd": _jsd}
