"""Row kernel of a TopK support: gathers k or k + 1 outcomes per row and hands them to another row kernel.

The other tokens enter as one logit, the log-sum-exp of theirs, z_o = ln sum_o exp z_v, so that softmax over the k + 1
outcomes gives p on S and 1 - sum_S p without subtracting anything. Its gradient g_o goes back to each of them as
g_o p_v / sum_o p. The two sides' difference of z_o is formed from differences, not from the two log-sum-exps:
z_o - z_o' = -ln(sum_o w exp(-d)) with d = z_s - z_t and w = p / sum_o p. The other kernel also sees the whole rows,
for the by-products and the full divergence.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence
from opsd_kernels.rows import APART, RESULTS, RowKernel, RowOutputs
from opsd_kernels.rows_torch import TEMPORARIES, Centred, Rows, centred, slabs, times


@dataclass(frozen=True)
class TopKRows:
    """elements: of the logits, handled at once; they bound the temporaries."""

    kernel: RowKernel
    elements: int

    def scratch_bytes(self, vocab: int) -> int:
        return TEMPORARIES * 4 * max(self.elements, vocab) + self.kernel.scratch_bytes(vocab)

    def run(
        self,
        z_s: Tensor,  # (n, V) fp32, consumed
        z_t: Tensor,  # (n, V) fp32, consumed; holds z_s - z_t when is_delta
        is_delta: bool,
        divergence: Divergence,
        scale: Tensor,  # (n,) fp32
        grad: Tensor | None,  # (n, V), may be z_s
        out: RowOutputs,
        tokens: Tensor | None = None,  # (n,) int64
    ) -> None:
        """As rows_torch.run; fills the results that are APPROXIMATED too."""
        for rows in slabs(len(z_s), z_s.shape[1], self.elements):
            target, sampled = (None if x is None else x[rows] for x in (grad, tokens))
            logits, results = Rows(z_s[rows], z_t[rows], is_delta), out.rows(rows)
            outcomes = _outcomes(logits, divergence, results)
            whole = replace(divergence, support=None)
            self.kernel.run(*logits, whole, scale[rows], None, results, sampled)
            self._approximate(outcomes, whole, scale[rows], target, results)

    def _approximate(
        self, outcomes: "Outcomes", divergence: Divergence, scale: Tensor, grad: Tensor | None, out: RowOutputs
    ) -> None:
        """Value and gradient of the outcomes, over those of the whole rows."""
        (z_s, second, is_delta), kept, share = outcomes
        merged = RowOutputs(torch.empty(len(RESULTS), len(z_s), dtype=torch.float32, device=z_s.device))
        slope = None if grad is None else torch.empty_like(z_s)
        self.kernel.run(z_s, second, is_delta, replace(divergence, temperature=1.0), scale, slope, merged, None)
        out["full_divergence"].copy_(out["value"])
        for name in ("value", "clip_fraction"):
            out[name].copy_(merged[name])
        if grad is not None and slope is not None:
            others = torch.zeros_like(share) if slope.shape[1] == kept.shape[1] else times(slope[:, -1:], share)
            grad.copy_(others.scatter_(1, kept, slope[:, : kept.shape[1]]))


class Outcomes(NamedTuple):
    rows: Rows  # (n, k) or, with a tail, (n, k + 1), at temperature 1
    kept: Tensor  # (n, k) int64, their columns
    share: Tensor  # (n, V) of each other column in the student's mass of all others; 0 on kept ones


def _outcomes(logits: Rows, divergence: Divergence, out: RowOutputs) -> Outcomes:
    support = divergence.support
    assert support is not None
    rows = centred(logits, 1.0 / divergence.temperature, APART)
    chooser = rows.s if support.of == "student" else rows.t
    kept = chooser.topk(support.k, dim=-1).indices
    student, teacher, d, share = _others(rows, kept)
    for side, x, other in (("student", rows.s, student), ("teacher", rows.t, teacher)):
        out[f"{side}_tail_mass"].copy_((other - x.logsumexp(-1, keepdim=True)).exp()[:, 0])
    z_s, second = (x.gather(1, kept) for x in (rows.s, rows.d if logits.is_delta else rows.t))
    if support.tail:
        z_s = torch.cat([z_s, student], dim=1)
        second = torch.cat([second, d if logits.is_delta else torch.where(d.isfinite(), student - d, teacher)], dim=1)
    return Outcomes(Rows(z_s, second, logits.is_delta), kept, share)


def _others(rows: Centred, kept: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The logit of "any other" of both sides and the difference of the two, (n, 1) each; and Outcomes.share."""
    s, t = (x.scatter(1, kept, -torch.inf) for x in (rows.s, rows.t))
    s_max, t_max = (_finite(x.amax(-1, keepdim=True)) for x in (s, t))
    e = (s - s_max).exp()
    total, t_total = e.sum(-1, keepdim=True), (t - t_max).exp().sum(-1, keepdim=True)
    student, teacher = s_max + total.log(), t_max + t_total.log()
    # sum of exp(t) - exp(s), as in rows_torch.py
    far = (t - s_max.clamp(min=t_max - 30)).exp() - e
    apart = torch.where(rows.d.abs() <= 1, e * torch.expm1(-rows.d), far).sum(-1, keepdim=True)
    ratio = apart / total
    near = (t_max - s_max < 30) & (ratio > -0.9)  # beyond, no digits are left: the sides may be centred far apart
    d = torch.where(near, -torch.log1p(ratio), student - teacher)
    return student, teacher, torch.where(total + t_total == 0, 0.0, d), e / torch.where(total > 0, total, 1.0)


def _finite(top: Tensor) -> Tensor:
    """The maximum of nothing is 0: it is subtracted."""
    return torch.where(top == -torch.inf, 0.0, top)
