"""What TRL and Liger share: one number, beta, that names the divergence."""

from __future__ import annotations

from opsd_kernels import Divergence
from opsd_kernels.scalars import is_number


def divergence_of(beta: float, temperature: float) -> Divergence:
    """beta 0 is the forward KL (teacher || student), 1 the reverse KL, between them the generalized JSD of that beta.

    Raises ValueError for beta outside [0, 1], or what Divergence refuses.
    """
    if not is_number(beta) or not 0 <= beta <= 1:
        raise ValueError(f"expected beta in [0, 1], got {beta!r}")
    if beta == 0:
        return Divergence("forward_kl", temperature=temperature)
    if beta == 1:
        return Divergence("reverse_kl", temperature=temperature)
    return Divergence("jsd", beta=beta, temperature=temperature)
