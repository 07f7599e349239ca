"""What numbers and flags fused_token_kl accepts. Raises ValueError("expected X, got Y")."""

from numbers import Integral, Real

# What logits are multiplied or divided by, alone and together: beyond, fp32 logits are not numbers any more.
LEAST, MOST = 1e-6, 1e6


def is_number(x: object) -> bool:
    """A real number of Python or numpy. Not a bool, and not a tensor: reading it would wait for a device."""
    return isinstance(x, Real) and not isinstance(x, bool)


def is_whole(x: object) -> bool:
    return isinstance(x, Integral) and not isinstance(x, bool)


def check_flag(name: str, x: object) -> None:
    if not isinstance(x, bool):
        raise ValueError(f"expected a bool {name}, got {x!r}")


def check_between(name: str, x: float, least: float = LEAST, most: float = MOST) -> None:
    if not is_number(x) or not least <= x <= most:
        raise ValueError(f"expected {name} as a number from {least:g} to {most:g}, got {x!r}")
