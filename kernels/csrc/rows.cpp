// C ABI, choice of the instruction set, and threads. Row kernels are in row.cpp.
// Threads are started per call: a second OpenMP runtime beside torch's would spin against it between GEMMs, and
// starting a thread costs microseconds where a chunk of rows takes milliseconds.
#include "rows.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <vector>

namespace {

struct Variant {
    const char* name;
    RowFunction run;
};

// What every processor of the family has: NEON is part of aarch64, and vector.h uses it.
#if defined(__aarch64__)
constexpr const char* BASELINE = "neon";
#else
constexpr const char* BASELINE = "generic";
#endif

Variant choose() {
#if defined(OPSD_X86_VARIANTS)
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl"))
        return {"avx512", avx512::run};
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return {"avx2", avx2::run};
#endif
    return {BASELINE, generic::run};
}

Variant variant_named(const char* name) {
    const Variant best = choose();
    if (name == nullptr) return best;
#if defined(OPSD_X86_VARIANTS)
    if (name[0] == 'a' && name[3] == '2' && best.run != generic::run) return {"avx2", avx2::run};
#endif
    return name[0] == 'g' ? Variant{BASELINE, generic::run} : best;
}

Variant current = variant_named(nullptr);

}  // namespace

OPSD_EXPORT int opsd_rows_abi() { return 3; }

OPSD_EXPORT const char* opsd_rows_isa() { return current.name; }

// Selects a lesser instruction set for tests ("avx2", "generic"); null or anything else: the best one.
OPSD_EXPORT void opsd_rows_use_isa(const char* name) { current = variant_named(name); }

OPSD_EXPORT void opsd_rows_run(
    float* z_s, float* z_t, int64_t rows, int64_t vocab, int64_t stride_s, int64_t stride_t,
    int is_delta, int kind, float beta, float inverse_temperature, float clip,
    const int64_t* tokens, const float* scale, float* grad, int64_t stride_grad,
    float* results, int64_t stride_results, int threads) {
    const MixtureSeries mixture = kind == JSD ? mixture_series(beta) : MixtureSeries{};
    const RowOptions options{vocab, is_delta != 0, kind, beta, inverse_temperature, clip, mixture};
    const RowFunction run = current.run;
    std::atomic<int64_t> next{0};
    auto work = [&] {
        const std::unique_ptr<float[]> scratch(new float[vocab]);
        for (int64_t i = next.fetch_add(1), following; i < rows; i = following) {
            following = next.fetch_add(1);
            const int64_t ahead = std::min(following, rows - 1);
            float* target = grad == nullptr ? nullptr : grad + i * stride_grad;
            const bool left_out = scale[i] == 0.0f;  // its gradient is 0, whatever its logits hold
            const Row row{z_s + i * stride_s, z_t + i * stride_t, left_out ? nullptr : target, scale[i],
                          tokens == nullptr ? NO_TOKEN : tokens[i], scratch.get(),
                          z_s + ahead * stride_s, z_t + ahead * stride_t};
            const RowResult r = run(row, options);
            if (left_out && target != nullptr) std::fill_n(target, vocab, 0.0f);
            for (int k = 0; k < RESULTS; ++k) results[k * stride_results + i] = r.of[k];
        }
    };
    const int64_t useful = std::max<int64_t>(1, rows * vocab / (1 << 16));  // a thread per 64k elements at most
    const int helpers = static_cast<int>(std::min<int64_t>({threads, rows, useful})) - 1;
    std::vector<std::thread> pool;
    for (int i = 0; i < helpers; ++i) pool.emplace_back(work);
    work();
    for (auto& thread : pool) thread.join();
}
