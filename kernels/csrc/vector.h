// One vector type for every instruction set: as wide as the compiler may make it, a float where it knows no vectors.
// Comparisons give a Mask, `mask ? a : b` selects by lane. Included by row.cpp only, inside its namespace.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace OPSD_ISA {
namespace {

#if defined(__GNUC__)  // GCC and clang
#if defined(__AVX512F__)
constexpr int LANES = 16;
#elif defined(__AVX__)
constexpr int LANES = 8;
#else
constexpr int LANES = 4;  // SSE2, NEON; elsewhere the compiler takes them apart
#endif
typedef float Vec __attribute__((vector_size(4 * LANES)));
typedef int32_t Mask __attribute__((vector_size(4 * LANES)));

typedef double Wide __attribute__((vector_size(8 * LANES)));

inline Vec splat(float x) { return x - Vec{}; }  // x - 0 is x, so that nothing is computed
inline Wide widen(Vec x) { return __builtin_convertvector(x, Wide); }
inline Mask bits_of(Vec x) { return (Mask)x; }
inline Vec with_bits(Mask bits) { return (Vec)bits; }
inline Vec whole(Mask n) { return __builtin_convertvector(n, Vec); }
inline float lane(Vec x, int i) { return x[i]; }
inline double lane(Wide x, int i) { return x[i]; }

// Whether a comparison holds in every lane.
inline bool all(Mask x) {
#if defined(__AVX512F__)
    return _mm512_movepi32_mask((__m512i)x) == 0xffff;
#elif defined(__AVX__)
    return _mm256_movemask_ps((__m256)x) == 0xff;
#elif defined(__aarch64__)
    return vminvq_u32((uint32x4_t)x) != 0;
#else
    int32_t every = -1;
    for (int i = 0; i < LANES; ++i) every &= x[i];
    return every != 0;
#endif
}

// Asks for a line of memory that is read soon.
inline void fetch(const float* from) { __builtin_prefetch(from, 0, 2); }
#else
constexpr int LANES = 1;
using Vec = float;
using Mask = int32_t;
using Wide = double;

inline Vec splat(float x) { return x; }
inline Vec whole(Mask n) { return static_cast<float>(n); }
inline Wide widen(Vec x) { return x; }
inline float lane(Vec x, int) { return x; }
inline double lane(Wide x, int) { return x; }
inline bool all(Mask x) { return x != 0; }
inline void fetch(const float*) {}
inline Mask bits_of(Vec x) {
    Mask bits;
    std::memcpy(&bits, &x, sizeof bits);
    return bits;
}
inline Vec with_bits(Mask bits) {
    Vec x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
#endif

// `count` numbers from memory, and `rest` in the other lanes.
inline Vec load(const float* from, int64_t count, float rest) {
    Vec x = splat(rest);
    std::memcpy(&x, from, sizeof(float) * (count < LANES ? count : LANES));
    return x;
}

inline void store(float* to, Vec x, int64_t count) {
    std::memcpy(to, &x, sizeof(float) * (count < LANES ? count : LANES));
}

// body(i, count) for all columns from begin on; a count that the compiler knows, but for the last.
template <class Body>
inline void for_columns(int64_t begin, int64_t end, Body body) {
    int64_t i = begin;
    for (; i + LANES <= end; i += LANES) body(i, int64_t{LANES});
    if (i < end) body(i, end - i);
}

inline double sum(Wide x) {
    double total = 0;
    for (int i = 0; i < LANES; ++i) total += lane(x, i);
    return total;
}

inline float highest(Vec x) {
    float top = lane(x, 0);
    for (int i = 1; i < LANES; ++i) top = lane(x, i) > top ? lane(x, i) : top;
    return top;
}

inline Vec zero() { return splat(0.0f); }
inline Vec at_least(Vec x, float low) { return x < splat(low) ? splat(low) : x; }
inline Vec at_most(Vec x, float high) { return x > splat(high) ? splat(high) : x; }
inline Vec higher(Vec x, Vec y) { return x > y ? x : y; }
inline Vec magnitude(Vec x) { return with_bits(bits_of(x) & 0x7fffffff); }

// weight * x, where a weight of 0 outweighs an infinite or undefined x
inline Vec times(Vec weight, Vec x) { return weight == zero() ? zero() : weight * x; }

}  // namespace
}  // namespace OPSD_ISA
