// exp, log and two remainders in fp32, branch-free so that loops over them vectorise. Polynomials: interpolation at
// Chebyshev nodes, relative error below 2e-8 before rounding. NaN goes through.
// Everything is static: each instruction set must keep its own copy.
#pragma once
#include <cstdint>
#include <cstring>

static inline float from_bits(uint32_t bits) {
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}

static inline uint32_t to_bits(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}

// exp(x) for x <= 88; below -87.3, where the result would be subnormal, 0.
static inline float exp_of(float x) {
    const float clamped = x < -87.3f ? -87.3f : x;
    const float shifted = clamped * 1.44269504f + 12582912.0f;  // adding 1.5 * 2^23 rounds to an integer
    const float n = shifted - 12582912.0f;
    const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
    float poly = 1.392617589e-03f;
    poly = poly * r + 8.363173343e-03f;
    poly = poly * r + 4.166655615e-02f;
    poly = poly * r + 1.666657776e-01f;
    poly = poly * r + 5.000000000e-01f;
    const float fraction = 1.0f + (r + r * r * poly);
    const float power = from_bits((to_bits(shifted) + 127u) << 23);  // the low bits of `shifted` are n
    return x < -87.3f ? 0.0f : fraction * power;
}

// k(x) = exp(-x) - 1 + x >= 0 for |x| <= 1, to full relative accuracy.
static inline float exp_remainder(float x) {
    float poly = -2.806280236e-06f;
    poly = poly * x + 2.535851308e-05f;
    poly = poly * x - 1.983810216e-04f;
    poly = poly * x + 1.388539677e-03f;
    poly = poly * x - 8.333339356e-03f;
    poly = poly * x + 4.166673496e-02f;
    poly = poly * x - 1.666666716e-01f;
    poly = poly * x + 5.000000000e-01f;
    return x * x * poly;
}

// l(x) = x - ln(1 + x) >= 0 for x in [sqrt(1/2) - 1, sqrt(2) - 1], to full relative accuracy.
static inline float log_remainder(float x) {
    float poly = -6.769023836e-02f;
    poly = poly * x + 1.155728772e-01f;
    poly = poly * x - 1.181213632e-01f;
    poly = poly * x + 1.242081448e-01f;
    poly = poly * x - 1.423231810e-01f;
    poly = poly * x + 1.666753739e-01f;
    poly = poly * x - 2.000144720e-01f;
    poly = poly * x + 2.500001192e-01f;
    poly = poly * x - 3.333332241e-01f;
    poly = poly * x + 5.000000000e-01f;
    return x * x * poly;
}

// ln(x) for positive normal x.
static inline float log_of(float x) {
    const uint32_t offset = to_bits(x) - 0x3f3504f3u;  // sqrt(1/2): the mantissa ends in [sqrt(1/2), sqrt(2))
    const float n = static_cast<float>(static_cast<int32_t>(offset) >> 23);
    const float f = from_bits((offset & 0x007fffffu) + 0x3f3504f3u) - 1.0f;
    return (f - log_remainder(f)) + n * 0.693147181f;
}

static inline float magnitude(float x) { return from_bits(to_bits(x) & 0x7fffffffu); }
