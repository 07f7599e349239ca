// exp and the remainders of exp and log, without branches. Polynomials: interpolation at Chebyshev nodes, relative error
// below 2e-8 before rounding. NaN goes through. Included by row.cpp only.
#pragma once
#include "vector.h"

namespace OPSD_ISA {
namespace {

// Halves are evaluated side by side (Estrin): in Horner's order a row would wait for one multiplication after another.
template <int BEGIN, int COUNT, int N>
inline Vec part(const float (&coefficients)[N], const Vec (&powers)[4]) {
    if constexpr (COUNT == 1) {
        return splat(coefficients[BEGIN]);
    } else {
        constexpr int LOG = COUNT > 8 ? 3 : COUNT > 4 ? 2 : COUNT > 2 ? 1 : 0, LOW = 1 << LOG;
        return part<BEGIN, LOW>(coefficients, powers) +
               powers[LOG] * part<BEGIN + LOW, COUNT - LOW>(coefficients, powers);
    }
}

// Coefficients from the constant up, at most 16.
template <int N>
inline Vec polynomial(const float (&coefficients)[N], Vec x) {
    const Vec square = x * x, fourth = square * square;
    return part<0, N>(coefficients, {x, square, fourth, fourth * fourth});
}

// exp(x) for x <= 88; below -87.3, where the result would be subnormal, 0.
inline Vec exp_of(Vec x) {
    constexpr float P[] = {5.000000000e-01f, 1.666657776e-01f, 4.166655615e-02f, 8.363173343e-03f,
                           1.392617589e-03f};
    const Vec clamped = at_least(x, -87.3f);
    const Vec shifted = clamped * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const Vec n = shifted - 12582912.0f;
    const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    const Vec fraction = 1.0f + (r + r * r * polynomial(P, r));
    const Vec power = with_bits((bits_of(shifted) + 127) << 23);  // the low bits of `shifted` are n
    return x < splat(-87.3f) ? zero() : fraction * power;
}

// k(x) = exp(-x) - 1 + x >= 0 for |x| <= 1, to full relative accuracy.
inline Vec exp_remainder(Vec x) {
    constexpr float P[] = {5.000000000e-01f, -1.666666716e-01f, 4.166673496e-02f, -8.333339356e-03f,
                           1.388539677e-03f, -1.983810216e-04f, 2.535851308e-05f, -2.806280236e-06f};
    return x * x * polynomial(P, x);
}

// l(x) = x - ln(1 + x) >= 0 for x in (-1, sqrt(2) - 1], to full relative accuracy.
inline Vec log_remainder(Vec x) {
    constexpr float P[] = {5.000000000e-01f, -3.333332241e-01f, 2.500001192e-01f, -2.000144720e-01f,
                           1.666753739e-01f, -1.423231810e-01f, 1.242081448e-01f, -1.181213632e-01f,
                           1.155728772e-01f, -6.769023836e-02f};
    const Mask offset = bits_of(1.0f + x) - 0x3f3504f3;  // sqrt(1/2): the mantissa ends in [sqrt(1/2), sqrt(2))
    const Mask n = offset >> 23;
    const Vec scaled = with_bits((offset & 0x007fffff) + 0x3f3504f3) - 1.0f;
    const Vec f = n == 0 ? x : scaled;  // 1 + x has lost digits of a small x
    return (x - f) - whole(n) * 0.693147181f + f * f * polynomial(P, f);
}

}  // namespace
}  // namespace OPSD_ISA
