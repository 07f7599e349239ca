// Terms f of the value one by one, once the normalisers are known: for JSD, and for every clipped divergence. With
// r = ln p - ln q: reverse p r, forward -q r, JSD b q ln(q/M) + (1-b) p ln(p/M). `safe` forms f + (q - p), f - (q - p)
// and f have the same sum and cannot be negative; they give the value of a row without clipped columns.
// Included by row.cpp only.
#pragma once
#include "row_sums.h"

namespace OPSD_ISA {
namespace {

struct Terms {
    double safe = 0, value = 0;      // sum of safe forms, and of min(f, clip)
    double part = 0;                 // reverse: p r, JSD: p ln(p/M), of kept columns; JSD without a clip: KL(p||M)
    double kept = 0, lost = 0;       // mass of p, for forward KL of q, on kept and on clipped columns
    double student_lost = 0;         // mass of p on clipped columns
};

constexpr float CLIPPED = -INFINITY;  // in place of a slope

struct Term {
    float f, safe, student, slope;
};

inline Term reverse_term(float p, float q, float r) {
    const bool near = magnitude(r) <= 1.0f;
    const float f = times(p, r);
    return {f, near ? p * exp_remainder(near ? r : 0.0f) : f + (q - p), 0.0f, r};
}

inline Term forward_term(float p, float q, float r) {
    const bool near = magnitude(r) <= 1.0f;
    const float f = -times(q, r), safe = near ? r : 0.0f, k = exp_remainder(safe);
    return {f, near ? p * (safe * safe - k * (1.0f + safe)) : f + (p - q), 0.0f, near ? p * (safe - k) : p - q};
}

// With u = ln(q/p), E = e^u - 1, l(x) = x - ln(1 + x): p ln(p/M) + b (q - p) = p l(b E), and
// q ln(q/M) - (1-b) (q - p) = q l((1-b) (1 / (1+E) - 1)).
inline Term mixture_term(float p, float q, float r, float b) {
    const float a = 1.0f - b, u = -r;
    const bool near = magnitude(u) <= 0.25f;
    const float safe = near ? u : 0.0f;
    const float growth = safe + exp_remainder(-safe);  // E
    const float forth = b * growth, forth_remainder = log_remainder(forth);
    const float back_remainder = log_remainder(-a * growth / (1.0f + growth));
    const float near_student = p * forth_remainder;
    const float near_teacher = p * (1.0f + growth) * back_remainder;
    // far: from the side on which exp cannot overflow; g = ln(M/p), h = ln(q/M)
    const bool shrinks = u < 0.0f;
    const float y = exp_of(-magnitude(u)) - 1.0f;
    const float log_side = log_of(1.0f + (shrinks ? b : a) * y);
    const float g = shrinks ? log_side : u + log_side;
    const float h = shrinks ? u - log_side : -log_side;
    const float far_student = b * (q - p) - times(p, g);
    const float far_teacher = a * (p - q) + times(q, h);
    const float to_student = near ? near_student : far_student;
    const float to_teacher = near ? near_teacher : far_teacher;
    const float f = a * to_student + b * to_teacher;
    return {f, f, to_student, near ? forth_remainder - forth : -g};
}

// Leaves p in z_s, and in z_t r or, for JSD, ln(p/M); on clipped columns CLIPPED or 0. Where p = 0 it may be anything.
// Forward KL needs p and q again and leaves the rows as they are.
template <bool DELTA, int KIND, bool CLIP>
Terms terms_row(float* z_s, float* z_t, const RowOptions o, const Centre centre, const Sums& sums,
                const Statistics& st) {
    const float per_student = static_cast<float>(1.0 / sums.student);
    const float per_teacher = static_cast<float>(1.0 / st.teacher), c = static_cast<float>(st.c);
    Terms total;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        float safe = 0, value = 0, part = 0, kept = 0, lost = 0, student_lost = 0;
#pragma omp simd reduction(+ : safe, value, part, kept, lost, student_lost)
        for (int64_t i = begin; i < end; ++i) {
            const Element e = element<DELTA>(z_s[i], z_t[i], centre, o.inverse_temperature);
            const float p = e.e_s * per_student, q = e.e_t * per_teacher, r = e.d + c;
            const Term term = KIND == JSD          ? mixture_term(p, q, r, o.beta)
                              : KIND == FORWARD_KL ? forward_term(p, q, r)
                                                   : reverse_term(p, q, r);
            const bool over = CLIP && term.f > o.clip;
            safe += term.safe;
            if (!CLIP) part += term.student;
            if (CLIP) {
                const float mass = KIND == FORWARD_KL ? q : p;
                value += over ? o.clip : term.f;
                part += over ? 0.0f : KIND == JSD ? times(p, term.slope) : term.f;
                kept += over ? 0.0f : mass;
                lost += over ? mass : 0.0f;
                student_lost += over ? p : 0.0f;
            }
            if (KIND != FORWARD_KL) {
                z_s[i] = p;
                z_t[i] = over ? (KIND == JSD ? 0.0f : CLIPPED) : term.slope;
            }
        }
        total.safe += safe;
        total.value += value;
        total.part += part;
        total.kept += kept;
        total.lost += lost;
        total.student_lost += student_lost;
    }
    return total;
}

}  // namespace
}  // namespace OPSD_ISA
