// Row kernels of fused_token_kl for the CPU: plain C ABI, fp32 rows. Equations: kernels/opsd_kernels/divergence.py.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define OPSD_EXPORT extern "C" __declspec(dllexport)
#else
#define OPSD_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum Kind { REVERSE_KL = 0, FORWARD_KL = 1, JSD = 2 };

// JSD for one beta near r = ln p - ln q = 0:   ln(p/M) = r (b + r slope(r)),   its term f = p r^2 value(r).
// Coefficients from the constant up, for |r| <= REACH; mixture.cpp makes them.
struct MixtureSeries {
    static constexpr int TERMS = 12;
    static constexpr float REACH = 2.0f;
    float slope[TERMS], value[TERMS];
};

MixtureSeries mixture_series(double beta);

struct RowOptions {
    int64_t vocab;
    bool is_delta;         // the second row holds z_s - z_t instead of z_t
    int kind;
    float beta;            // weight of the teacher in the mixture, JSD only
    float inverse_temperature;
    float clip;            // upper limit of a term of the value; infinity: none
    MixtureSeries mixture;  // JSD only
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

struct Row {
    const float *z_s, *z_t;
    float* grad;                   // scale * d value / d (z_s / temperature); may be z_s, may be null
    float scale;
    int64_t token;
    float* e_s;                    // scratch of the thread, `vocab` numbers
    const float *next_s, *next_t;  // the row that the thread takes next, brought to its cache meanwhile
};

using RowFunction = RowResult (*)(const Row& row, const RowOptions& options);

// The same source, compiled once per instruction set.
namespace generic { RowResult run(const Row&, const RowOptions&); }
namespace avx2 { RowResult run(const Row&, const RowOptions&); }
namespace avx512 { RowResult run(const Row&, const RowOptions&); }
