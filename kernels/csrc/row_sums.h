// One row of fused_token_kl, compiled once per instruction set (OPSD_ISA names the namespace).
//
// Centred at the student's argmax a:   s = (z_s - z_s[a]) / T,   t = (z_t - z_t[a]) / T,   d = s - t.
// With S = sum e^s and Q = sum e^t:    c = ln(Q / S) = ln(1 + (Q - S) / S),   r = ln p - ln q = d + c.
// Q - S is summed as e^s (k(d) - d), k(d) = e^-d - 1 + d, where |d| <= 1, and as e^t - e^s elsewhere: the signal of
// self-distillation is a small d under large logits, and this form never subtracts two large sums. Teacher terms
// carry exp(-t_max) so that nothing overflows. Blocks are summed in fp32 lanes, rows in double.
// Included by row.cpp only.
#pragma once
#include "rows.h"
#include "vector_math.h"

#include <cmath>

namespace OPSD_ISA {
namespace {

// Options and centre are passed by value: behind a reference, a store to a row could change them, and no loop with
// stores would vectorise.
constexpr int64_t BLOCK = 256;  // few enough that what fp32 sums round stays below 2e-7 of a divergence

struct Centre {
    float z_s, second;  // both rows at the student's argmax; `second` is z_t or z_s - z_t
    float t_max;        // teacher's maximum in centred units
    bool agrees;        // no teacher logit is above the one at a
};

struct Element {
    float s, t, d, e_s, e_t;  // e_t = exp(t - t_max)
};

template <bool DELTA>
inline Element element(float z_s, float second, Centre centre, float inverse_t) {
    Element e;
    const float student = z_s - centre.z_s, other = second - centre.second;
    e.s = student * inverse_t;
    e.d = (DELTA ? other : student - other) * inverse_t;  // subtracted first: equal rows give 0, whatever is fused
    e.t = (DELTA ? student - other : other) * inverse_t;
    e.e_s = exp_of(e.s);
    e.e_t = exp_of(e.t - centre.t_max);
    return e;
}

// weight * x, where a weight of 0 outweighs an infinite or undefined x
inline float times(float weight, float x) { return weight == 0.0f ? 0.0f : weight * x; }

inline float at_least(float x, float low) { return x < low ? low : x; }

template <bool DELTA>
Centre find_centre(const float* z_s, const float* z_t, const RowOptions o) {
    float top = -INFINITY, teacher_top = -INFINITY;
    int64_t best_block = 0;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        float block_top = -INFINITY;
#pragma omp simd reduction(max : block_top, teacher_top)
        for (int64_t i = begin; i < end; ++i) {
            const float teacher = DELTA ? z_s[i] - z_t[i] : z_t[i];
            block_top = z_s[i] > block_top ? z_s[i] : block_top;
            teacher_top = teacher > teacher_top ? teacher : teacher_top;
        }
        if (block_top > top) {
            top = block_top;
            best_block = begin;
        }
    }
    int64_t a = best_block;
    while (a + 1 < o.vocab && z_s[a] != top) ++a;
    const float teacher_here = DELTA ? z_s[a] - z_t[a] : z_t[a];
    if (teacher_here == -INFINITY)  // the teacher excludes a: its own maximum is the centre, and d there is infinite
        return {z_s[a], DELTA ? z_s[a] - teacher_top : teacher_top, 0.0f, false};
    const float t_max = (teacher_top - teacher_here) * o.inverse_temperature;
    return {z_s[a], z_t[a], t_max, t_max <= 0.0f};
}

// Sums over a row. near: columns with |d| <= 1; far: the others. Teacher terms in units of exp(t_max).
struct Sums {
    double student = 0, near_difference = 0, near_remainder = 0, near_forward = 0;
    double far_teacher = 0, far_student = 0, far_reverse = 0, far_forward = 0;
    double student_moment = 0, teacher_moment = 0;
};

template <bool DELTA, int KIND, bool KEEP>
Sums sum_row(float* z_s, float* z_t, const RowOptions o, const Centre centre) {
    Sums total;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        float student = 0, near_difference = 0, near_remainder = 0, near_forward = 0, far_teacher = 0;
        float far_student = 0, far_reverse = 0, far_forward = 0, student_moment = 0, teacher_moment = 0;
#pragma omp simd reduction(+ : student, near_difference, near_remainder, near_forward, far_teacher, far_student, \
                               far_reverse, far_forward, student_moment, teacher_moment)
        for (int64_t i = begin; i < end; ++i) {
            const Element e = element<DELTA>(z_s[i], z_t[i], centre, o.inverse_temperature);
            const bool near = magnitude(e.d) <= 1.0f;  // false for inf - inf, whose terms are 0 on the far side
            const float d = near ? e.d : 0.0f, e_near = near ? e.e_s : 0.0f;
            const float k = exp_remainder(d);
            student += e.e_s;
            near_difference += e_near * (k - d);
            far_teacher += near ? 0.0f : e.e_t;
            far_student += near ? 0.0f : e.e_s;
            if (KIND == REVERSE_KL) {
                near_remainder += e_near * k;
                far_reverse += near ? 0.0f : times(e.e_s, e.d);
            }
            if (KIND == FORWARD_KL) {
                near_forward += e_near * (d * d - k * (1.0f + d));  // e^t k(-d)
                far_forward += near ? 0.0f : times(e.e_t, e.d);
            }
            student_moment += e.e_s * at_least(e.s, -100.0f);
            teacher_moment += e.e_t * at_least(e.t - centre.t_max, -100.0f);
            if (KEEP) {
                z_s[i] = e.e_s;
                z_t[i] = e.d;
            }
        }
        total.student += student;
        total.near_difference += near_difference;
        total.near_remainder += near_remainder;
        total.near_forward += near_forward;
        total.far_teacher += far_teacher;
        total.far_student += far_student;
        total.far_reverse += far_reverse;
        total.far_forward += far_forward;
        total.student_moment += student_moment;
        total.teacher_moment += teacher_moment;
    }
    return total;
}

struct Statistics {
    double teacher;  // Q in units of exp(t_max)
    double c;        // ln(Q / S)
    double value;    // of the two KLs; JSD needs another pass
};

Statistics finish(const Sums& sums, const Centre& centre, int kind) {
    Statistics st;
    const double unit = std::exp(-static_cast<double>(centre.t_max));
    const double difference = unit * (sums.near_difference - sums.far_student) + sums.far_teacher;  // Q - S
    st.teacher = unit * sums.student + difference;
    st.c = centre.t_max < 30.0f ? std::log1p(difference / (unit * sums.student))
                                : centre.t_max + std::log(st.teacher / sums.student);
    st.value = 0;
    if (kind == REVERSE_KL)  // sum p d + c, first-order terms cancel in double
        st.value = (sums.near_remainder - sums.near_difference + sums.far_reverse) / sums.student + st.c;
    if (kind == FORWARD_KL)  // -sum q d - c
        st.value =
            (unit * (sums.near_difference + sums.near_forward) - sums.far_forward) / st.teacher - st.c;
    return st;
}

}  // namespace
}  // namespace OPSD_ISA
