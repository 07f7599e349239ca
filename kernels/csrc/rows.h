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
    float clip;            // upper limit of a term of the value; infinity: none
};

constexpr int64_t NO_TOKEN = -1;  // and every other negative one: log-probabilities of 0

// What a row gives, in the order of RESULTS in rows.py.
enum Result {
    VALUE, STUDENT_ENTROPY, TEACHER_ENTROPY, STUDENT_LSE, TEACHER_LSE, TOP1_AGREEMENT, STUDENT_LOGPROB, TEACHER_LOGPROB,
    CLIP_FRACTION, RESULTS
};

struct RowResult {
    float of[RESULTS];
};

// One row. z_s and z_t are consumed; grad (may be z_s, may be null) = scale * d value / d (z_s / temperature).
using RowFunction = RowResult (*)(float* z_s, float* z_t, const RowOptions& options, int64_t token, float scale,
                                  float* grad);

// The same source, compiled once per instruction set.
namespace generic { RowResult row(float*, float*, const RowOptions&, int64_t, float, float*); }
namespace avx2 { RowResult row(float*, float*, const RowOptions&, int64_t, float, float*); }
namespace avx512 { RowResult row(float*, float*, const RowOptions&, int64_t, float, float*); }
