// Row kernels of fused_token_kl for the CPU: plain C ABI, fp32 rows. Equations: kernels/opsd_kernels/divergence.py.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define OPSD_EXPORT extern "C" __declspec(dllexport)
#else
#define OPSD_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum Kind { REVERSE_KL = 0, FORWARD_KL = 1, JSD = 2 };

struct RowOptions {
    int64_t vocab;
    bool is_delta;         // the second row holds z_s - z_t instead of z_t
    int kind;
    float beta;            // weight of the teacher in the mixture, JSD only
    float inverse_temperature;
};

struct RowResult {
    float value, student_entropy, teacher_entropy;
};

// One row. z_s and z_t are consumed; grad (may be z_s, may be null) = scale * d value / d (z_s / temperature).
using RowFunction = RowResult (*)(float* z_s, float* z_t, const RowOptions& options, float scale, float* grad);

// The same source, compiled once per instruction set.
namespace generic { RowResult row(float*, float*, const RowOptions&, float, float*); }
namespace avx2 { RowResult row(float*, float*, const RowOptions&, float, float*); }
namespace avx512 { RowResult row(float*, float*, const RowOptions&, float, float*); }
