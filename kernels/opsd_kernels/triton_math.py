"""The functions of csrc/vector_math.h that Triton lacks, in fp32. exp and log are its own."""

import triton
import triton.language as tl

LN2 = tl.constexpr(0.6931471805599453)
SQRT_HALF = tl.constexpr(0x3F3504F3)  # bits of sqrt(1/2) in fp32


@triton.jit
def exp_remainder(x):
    """exp(-x) - 1 + x >= 0 for |x| <= 1, to full relative accuracy."""
    poly = -2.806280236e-06 * x + 2.535851308e-05
    poly = poly * x - 1.983810216e-04
    poly = poly * x + 1.388539677e-03
    poly = poly * x - 8.333339356e-03
    poly = poly * x + 4.166673496e-02
    poly = poly * x - 1.666666716e-01
    poly = poly * x + 5.000000000e-01
    return x * x * poly


@triton.jit
def log_remainder(x):
    """x - ln(1 + x) >= 0 for x in [sqrt(1/2) - 1, sqrt(2) - 1], to full relative accuracy."""
    poly = -6.769023836e-02 * x + 1.155728772e-01
    poly = poly * x - 1.181213632e-01
    poly = poly * x + 1.242081448e-01
    poly = poly * x - 1.423231810e-01
    poly = poly * x + 1.666753739e-01
    poly = poly * x - 2.000144720e-01
    poly = poly * x + 2.500001192e-01
    poly = poly * x - 3.333332241e-01
    poly = poly * x + 5.000000000e-01
    return x * x * poly


@triton.jit
def log_parts(x):
    """k and f in [sqrt(1/2) - 1, sqrt(2) - 1) with 1 + x = 2^k (1 + f), f exactly x where k is 0; for 1 + x > 0.

    ln(1 + x) = k ln 2 + f - log_remainder(f), to full relative accuracy.
    """
    bits = (1.0 + x).to(tl.int32, bitcast=True)
    k = (bits - SQRT_HALF) >> 23
    f = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    return k.to(tl.float32), tl.where(k == 0, x, f)


@triton.jit
def ln_one_plus(x):
    small = tl.abs(x) <= 0.25
    safe = tl.where(small, x, 0.0)
    return tl.where(small, safe - log_remainder(safe), tl.log(1.0 + x))


@triton.jit
def times(weight, x):
    """weight * x, where a weight of 0 outweighs an infinite or undefined x."""
    return tl.where(weight == 0.0, 0.0, weight * x)
