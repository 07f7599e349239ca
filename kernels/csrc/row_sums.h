// One row of fused_token_kl, compiled once per instruction set (OPSD_ISA names the namespace).
//
// Centred at the student's argmax a:   s = (z_s - z_s[a]) / T,   t = (z_t - z_t[a]) / T,   d = s - t.
// With S = sum e^s and Q = sum e^t:    c = ln(Q / S) = ln(1 + (Q - S) / S),   r = ln p - ln q = d + c.
// Q - S is summed as e^s (k(d) - d), k(d) = e^-d - 1 + d, where |d| <= 1, and as e^t - e^s elsewhere: the signal of
// self-distillation is a small d under large logits, and this form never subtracts two large sums. It takes one
// exponential where all columns of a vector are near. The teacher's terms of the others carry exp(-t_max) so that
// nothing overflows. Blocks are summed in fp32, 16 terms to a lane, rows in double.
// Where t_max is beyond APART, columns that both sides share would have an r that is the small difference of a huge d and
// a huge c: there t is centred at the teacher's own maximum, which leaves |c| <= ln V. Not for a reverse KL without a
// clip: its gradient, p (d - sum p d), lives around a, and its value is as large as c.
// Included by row.cpp only.
#pragma once
#include "rows.h"
#include "vector_math.h"

namespace OPSD_ISA {
namespace {

constexpr int64_t BLOCK = 16 * LANES;  // few enough that what fp32 sums round stays below 2e-7 of a divergence
constexpr float NO_MASS = -100.0f;     // in place of a centred logit of -inf, whose exponential is 0
constexpr float LARGEST = 3.4028235e38f;
constexpr float ROUNDED = 60.0f;       // beyond it the roundings of z_s - z_t over a low temperature have left no digits
constexpr float APART = 30.0f;  // so far above ln V that around a, where c >= t_max - ln V, c would be the larger one

struct Centre {
    float z_s, second;  // both rows at the student's argmax; `second` is z_t or z_s - z_t
    float top;          // what `second` would be at a, were the teacher's maximum there
    float t_max;        // the teacher's maximum in centred units
    bool agrees;        // no teacher logit is above the one at a
};

struct Logits {
    Vec s, t, d;  // centred; t at the teacher's maximum, t - t_max in the equations above
};

// Columns beyond the row's end have no mass on either side.
template <bool DELTA>
inline Logits logits_at(const float* z_s, const float* second, int64_t count, const Centre& centre, float inverse_t) {
    const Vec student = load(z_s, count, -INFINITY) - centre.z_s;
    const Vec either = load(second, count, DELTA ? 0.0f : -INFINITY);
    const Vec other = either - centre.second, low = either - centre.top;
    // subtracted first: equal rows give 0 and the teacher's maximum does, whatever is fused; of differences but for ROUNDED
    return {student * inverse_t, DELTA ? at_most((student - low) * inverse_t, ROUNDED) : low * inverse_t,
            (DELTA ? other : student - other) * inverse_t};
}

template <bool DELTA>
Centre find_centre(const float* z_s, const float* z_t, const RowOptions& o) {
    float top = -INFINITY;
    Vec teacher_top = splat(-INFINITY);
    int64_t best_block = 0;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        Vec block_top = splat(-INFINITY);
        for_columns(begin, end, [&](int64_t i, int64_t count) {
            const Vec student = load(z_s + i, count, -INFINITY), second = load(z_t + i, count, DELTA ? 0.0f : -INFINITY);
            block_top = higher(student, block_top);
            teacher_top = higher(DELTA ? student - second : second, teacher_top);
        });
        if (highest(block_top) > top) {
            top = highest(block_top);
            best_block = begin;
        }
    }
    int64_t a = best_block;
    while (a + 1 < o.vocab && z_s[a] != top) ++a;
    const float teacher_highest = highest(teacher_top), teacher_here = DELTA ? z_s[a] - z_t[a] : z_t[a];
    const float own = DELTA ? z_s[a] - teacher_highest : teacher_highest, peak = teacher_highest - teacher_here;
    const bool at_a = o.kind == REVERSE_KL && o.clip == INFINITY, agrees = peak <= 0.0f;
    // infinite where the teacher excludes a, and so would d be there
    const bool apart = peak * o.inverse_temperature > (at_a ? LARGEST : APART);
    const float second = apart ? own : z_t[a], peer = agrees ? second : own;
    return {z_s[a], second, peer, (DELTA ? second - peer : peer - second) * o.inverse_temperature, agrees};
}

// Sums over a row. near: columns with |d| <= 1; far: the others, teacher terms in units of exp(t_max).
template <class Number>
struct SumsOf {
    Number student{}, near_difference{}, near_remainder{}, near_forward{};
    Number far_teacher{}, far_student{}, far_reverse{}, far_forward{};
    Number student_moment{}, near_moment{}, far_moment{};  // of e^s s, of e^t and of e^(t - t_max) times t - t_max
};

using Sums = SumsOf<double>;

template <class To, class From, class Change>
inline void for_each_sum(SumsOf<To>& to, const SumsOf<From>& from, Change change) {
    change(to.student, from.student);
    change(to.near_difference, from.near_difference);
    change(to.near_remainder, from.near_remainder);
    change(to.near_forward, from.near_forward);
    change(to.far_teacher, from.far_teacher);
    change(to.far_student, from.far_student);
    change(to.far_reverse, from.far_reverse);
    change(to.far_forward, from.far_forward);
    change(to.student_moment, from.student_moment);
    change(to.near_moment, from.near_moment);
    change(to.far_moment, from.far_moment);
}

// d: 0 where a column is far, and so is e_s.
template <int KIND>
inline void add_near(SumsOf<Vec>& block, Vec e_s, Vec d, Vec t) {
    const Vec k = exp_remainder(d), difference = e_s * (k - d);
    block.near_difference += difference;
    block.near_moment += (e_s + difference) * at_least(t, NO_MASS);
    if (KIND == REVERSE_KL) block.near_remainder += e_s * k;
    if (KIND == FORWARD_KL) block.near_forward += e_s * (d * d - k * (1.0f + d));  // e^t k(-d)
}

template <int KIND>
inline void add_far(SumsOf<Vec>& block, Vec e_s, Vec d, Vec t, Mask near) {
    const Vec e_t = near ? zero() : exp_of(t), student = near ? zero() : e_s;
    block.far_teacher += e_t;
    block.far_student += student;
    block.far_moment += e_t * at_least(t, NO_MASS);
    if (KIND == REVERSE_KL) block.far_reverse += times(student, d);
    if (KIND == FORWARD_KL) block.far_forward += times(e_t, d);
}

// Leaves e^s in row.e_s and, with KEEP, d in row.grad.
template <bool DELTA, int KIND, bool KEEP>
Sums sum_row(const Row& where, const RowOptions& o, const Centre& centre) {
    const Centre at = centre;  // copies, which no store to a row can change
    const Row row = where;
    const float inverse_t = o.inverse_temperature;
    SumsOf<Wide> lanes;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        SumsOf<Vec> block;
        for_columns(begin, end, [&](int64_t i, int64_t count) {
            fetch(row.next_s + i);
            if (KIND == REVERSE_KL) fetch(row.next_t + i);  // the others have a long pass to come
            const Logits z = logits_at<DELTA>(row.z_s + i, row.z_t + i, count, at, inverse_t);
            const Vec e_s = exp_of(z.s);
            const Mask near = magnitude(z.d) <= splat(1.0f);  // false for inf - inf, whose terms are 0 on the far side
            block.student += e_s;
            block.student_moment += e_s * at_least(z.s, NO_MASS);
            if (all(near)) {
                add_near<KIND>(block, e_s, z.d, z.t);
            } else {
                add_near<KIND>(block, near ? e_s : zero(), near ? z.d : zero(), near ? z.t : zero());
                add_far<KIND>(block, e_s, z.d, z.t, near);
            }
            store(row.e_s + i, e_s, count);
            if (KEEP) store(row.grad + i, z.d, count);
        });
        for_each_sum(lanes, block, [](Wide& to, Vec from) { to += widen(from); });
    }
    Sums total;
    for_each_sum(total, lanes, [](double& to, Wide from) { to = sum(from); });
    return total;
}

struct Statistics {
    double teacher;         // Q in units of exp(t_max)
    double teacher_moment;  // sum of e^(t - t_max) (t - t_max)
    double c;               // ln(Q / S)
    double value;           // of the two KLs; JSD needs another pass
};

Statistics finish(const Sums& sums, const Centre& centre, int kind) {
    Statistics st;
    const double unit = std::exp(-static_cast<double>(centre.t_max));
    const double student = unit * sums.student;
    double difference = unit * (sums.near_difference - sums.far_student) + sums.far_teacher;  // Q - S
    // the maximum alone is 1: nothing of it is ROUNDED, or of a row that is all -inf
    if (student + difference < std::exp(-ROUNDED) && std::isfinite(centre.top)) difference = 1 - student;
    st.teacher = student + difference;
    st.teacher_moment = unit * sums.near_moment + sums.far_moment;
    // else 1 + ratio has next to no digits, or unit is too small
    const bool fits = centre.t_max < APART && difference > -0.99 * student;
    st.c = fits ? std::log1p(difference / student) : centre.t_max + std::log(st.teacher / sums.student);
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
