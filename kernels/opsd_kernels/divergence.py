"""The divergences as data. p = softmax(z_s / T) is the student, q = softmax(z_t / T) the teacher.

kind        value per token                         gradient with respect to z_s, times T
reverse_kl  sum p (ln p - ln q)                     p (r - KL),  r = ln p - ln q
forward_kl  sum q (ln q - ln p)                     p - q
jsd         b KL(q||M) + (1-b) KL(p||M)             (1-b) p (ln(p/M) - KL(p||M)),  M = (1-b) p + b q

Each value is a sum over the vocabulary of terms f_v = p r, -q r, or b q ln(q/M) + (1-b) p ln(p/M). With a clip c the
value is sum_v min(f_v, c), as OPSD (arXiv 2601.18734) clamps them; only terms below it carry gradient:

kind        gradient of sum_v min(f_v, c), times T; m_v = 1[f_v <= c], E = sum over the clipped entries
reverse_kl  p_v (m_v (r_v + 1) - sum_u m_u p_u (r_u + 1))  = p_v (m_v r_v - (1 - m_v) - (KL - E[p (r + 1)]))
forward_kl  p_v sum_u m_u q_u - m_v q_v                    = p_v - m_v q_v - p_v E[q]
jsd         (1-b) p_v (m_v ln(p_v/M_v) - sum_u m_u p_u ln(p_u/M_u))

The KLs have negative terms, so their clipped value may be negative; the terms of jsd are not (log-sum inequality).

A support is an approximation, asked for by name: the sums above run over the k most likely tokens S of one side only,
chosen per token and held fixed for the gradient, which is exact for this definition.

TopK(k)              outcomes                                        p and q of them
tail=True            the tokens of S, and "any other" as one more    p_v on S, 1 - sum_S p
tail=False           the tokens of S                                 p_v / sum_S p: renormalised

With a tail (and no clip) the value is a lower bound of the full one, whichever side chooses: merging outcomes cannot
tell p and q further apart (data processing inequality). Renormalised it is no bound in either direction.
"""

import difflib
from dataclasses import dataclass

from opsd_kernels.scalars import check_between, check_flag, is_number, is_whole

KINDS = ("reverse_kl", "forward_kl", "jsd")
SIDES = ("student", "teacher")
LEAST_BETA = 1e-6  # from 0 or 1: here two digits are left of what the lighter side adds in fp32, at 1e-4 four


@dataclass(frozen=True)
class TopK:
    """The k most likely tokens of one side, "student" or "teacher", with or without a bucket for all others.

    TokenStats then tells what is left out: both sides' mass beyond the k tokens, and the full divergence.
    Raises ValueError for k below 1, a tail that is not a bool, or another side.
    """

    k: int
    tail: bool = True
    of: str = "student"

    def __post_init__(self) -> None:
        if not is_whole(self.k) or self.k < 1:
            raise ValueError(f"expected a whole k >= 1 of TopK, got {self.k!r}")
        check_flag("tail of TopK", self.tail)
        if not isinstance(self.of, str) or self.of not in SIDES:
            raise ValueError(f"expected TopK of {' or '.join(SIDES)}, got {self.of!r}")


@dataclass(frozen=True)
class Divergence:
    """Which divergence, at which temperature both sides are compared, and where its terms are clipped.

    kind: one of KINDS. beta: weight of the teacher in the mixture M, read by "jsd" only (yet a number for every kind),
    from 1e-6 to 1 - 1e-6; its limits are the two KLs (jsd / beta -> forward_kl, jsd / (1 - beta) -> reverse_kl).
    temperature: divides both logits, or the student's where teacher_temperature is given. It divides their rounding
    too: fp32 logits of size z leave 6e-8 z / T. Of logits that are given the rows lose about 1e-6, relative, at any T,
    but for two things: under one head, where the teacher's are z_s - delta, columns that only the teacher finds
    likely are exact to 1.2e-7 (max z_s - z_s) / T, which leaves no digits of sides 1e8 T apart, finite results
    only; and the gradient of a jsd of sides with next to nothing in common, itself next to nothing, to 1e-7.
    clip: upper limit of each vocabulary term before the sum (None: none); the equations are above.
    support: None, the whole vocabulary, or the TopK that approximates it.
    Raises ValueError for an unknown kind, a beta beyond these, a temperature that is no number from 1e-6 to 1e6, a clip
    that is none from 1e-30 to 1e30, a support of another type.
    """

    kind: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0
    teacher_temperature: float | None = None
    clip: float | None = None
    support: TopK | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.kind, str) or self.kind not in KINDS:
            near = difflib.get_close_matches(str(self.kind), KINDS, n=1, cutoff=0.3)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"expected a divergence kind out of {', '.join(KINDS)}, got {self.kind!r}{hint}")
        if not is_number(self.beta) or (self.kind == "jsd" and not LEAST_BETA <= self.beta <= 1 - LEAST_BETA):
            raise ValueError(
                f"expected beta of jsd as a number from {LEAST_BETA} to 1 - {LEAST_BETA}, got {self.beta!r}; "
                "its limits are forward_kl and reverse_kl"
            )
        check_between("temperature", self.temperature)
        if self.teacher_temperature is not None:
            check_between("teacher_temperature", self.teacher_temperature)
        if self.clip is not None:
            check_between("clip", self.clip, 1e-30, 1e30)
        if self.support is not None and not isinstance(self.support, TopK):
            raise ValueError(f"expected support as a TopK or None, got {self.support!r}")

    @property
    def temperatures(self) -> tuple[float, float]:
        """Of the student and of the teacher."""
        other = self.teacher_temperature
        return self.temperature, self.temperature if other is None else other

    @property
    def needs_terms(self) -> bool:
        """Whether the terms need a pass of their own, after the normalisers are known."""
        return self.kind == "jsd" or self.clip is not None

    @classmethod
    def of(cls, value: "Divergence | str") -> "Divergence":
        """A Divergence as it is, a str as Divergence(kind)."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        raise ValueError(f"expected a Divergence or its kind as a str, got {type(value).__name__}")
