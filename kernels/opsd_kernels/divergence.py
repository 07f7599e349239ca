"""The divergences as data. p = softmax(z_s / T) is the student, q = softmax(z_t / T) the teacher.

kind        value per token                         gradient with respect to z_s, times T
reverse_kl  sum p (ln p - ln q)                     p (r - KL),  r = ln p - ln q
forward_kl  sum q (ln q - ln p)                     p - q
jsd         b KL(q||M) + (1-b) KL(p||M)             (1-b) p (ln(p/M) - KL(p||M)),  M = (1-b) p + b q
"""

import difflib
from dataclasses import dataclass

KINDS = ("reverse_kl", "forward_kl", "jsd")


@dataclass(frozen=True)
class Divergence:
    """Which divergence, and at which temperature both sides are compared.

    kind: one of KINDS. beta: weight of the teacher in the mixture M, read by "jsd" only, inside (0, 1); its limits
    are the two KLs (jsd / beta -> forward_kl, jsd / (1 - beta) -> reverse_kl). temperature: divides both logits.
    Raises ValueError for an unknown kind, beta outside (0, 1) or a temperature that is not positive and finite.
    """

    kind: str = "reverse_kl"
    beta: float = 0.5
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            near = difflib.get_close_matches(str(self.kind), KINDS, n=1, cutoff=0.3)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            raise ValueError(f"expected a divergence kind out of {', '.join(KINDS)}, got {self.kind!r}{hint}")
        if self.kind == "jsd" and not 0.0 < self.beta < 1.0:
            raise ValueError(
                f"expected 0 < beta < 1 for jsd, got {self.beta}; its limits are forward_kl and reverse_kl"
            )
        if not 0.0 < self.temperature < float("inf"):
            raise ValueError(f"expected a positive, finite temperature, got {self.temperature}")

    @classmethod
    def of(cls, value: "Divergence | str") -> "Divergence":
        """A Divergence as it is, a str as Divergence(kind)."""
        if isinstance(value, cls):
            return value
        if isinstance(value, str):
            return cls(value)
        raise ValueError(f"expected a Divergence or its kind as a str, got {type(value).__name__}")
