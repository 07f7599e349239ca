// Terms f of the value one by one, once the normalisers are known: for JSD, and for every clipped divergence. With
// r = ln p - ln q: reverse p r, forward -q r, JSD b q ln(q/M) + (1-b) p ln(p/M). `safe` forms f + (q - p), f - (q - p)
// and f have the same sum and cannot be negative; they give the value of a row without clipped columns.
// Included by row.cpp only.
#pragma once
#include "row_sums.h"

namespace OPSD_ISA {
namespace {

template <class Number>
struct TermsOf {
    Number safe{}, value{};   // sum of safe forms, and of min(f, clip)
    Number part{};            // reverse: p r, JSD: p ln(p/M), of kept columns; JSD without a clip: KL(p||M)
    Number kept{}, lost{};    // mass of p, for forward KL of q, on kept and on clipped columns
    Number student_lost{};    // mass of p on clipped columns
};

using Terms = TermsOf<double>;

template <class To, class From, class Change>
inline void for_each_sum(TermsOf<To>& to, const TermsOf<From>& from, Change change) {
    change(to.safe, from.safe);
    change(to.value, from.value);
    change(to.part, from.part);
    change(to.kept, from.kept);
    change(to.lost, from.lost);
    change(to.student_lost, from.student_lost);
}

constexpr float CLIPPED = -INFINITY;  // in place of a slope

struct Term {
    Vec p, q;
    Vec f, safe;
    Vec student, slope;  // of JSD: a term of KL(p||M), and ln(p/M)
};

// What turns an element of a row into probabilities and r.
struct Normaliser {
    float per_student, per_teacher, c, t_max;
};

inline Term reverse_term(Vec p, Vec q, Vec r) {
    const Mask near = magnitude(r) <= splat(1.0f);
    const Vec f = times(p, r), safe = near ? p * exp_remainder(near ? r : zero()) : f + (q - p);
    return {p, q, f, safe, zero(), r};
}

inline Term forward_term(Vec p, Vec q, Vec r) {
    const Mask near = magnitude(r) <= splat(1.0f);
    const Vec f = -times(q, r), small = near ? r : zero(), k = exp_remainder(small);
    const Vec safe = near ? p * (small * small - k * (1.0f + small)) : f + (p - q);
    return {p, q, f, safe, zero(), near ? p * (small - k) : p - q};
}

// Of the heavier side m = max(p, q) only, so that nothing overflows and no term of first order is subtracted. With
// w the other side's weight in M, v = 1 - w, y = e^-|r| - 1, k = y + |r|, l(x) = x - ln(1 + x) and l = l(w y):
//   f = m ((1 + w y) l + w (v y^2 - (1 + y) k))
//   p ln(p/M) + b (q - p) = p l, or, where the teacher is heavier, q (v y^2 + (1 + y) (l - k))
// Beyond a distance of 100 the lighter side has no mass left, and a column without mass (r = inf - inf) is put at 0.
inline Term mixture_term(const Element& e, Vec r, const Normaliser& n, float b) {
    const Mask student = r >= zero();
    const Vec m = exp_of(student ? e.s : e.t - n.t_max) * (student ? splat(n.per_student) : splat(n.per_teacher));
    const Vec w = student ? splat(b) : splat(1.0f - b), v = student ? splat(1.0f - b) : splat(b);
    const Vec distance = m == zero() ? zero() : at_most(magnitude(r), 100.0f);
    const Mask near = distance <= splat(1.0f);
    const Vec small = near ? distance : zero(), remainder = exp_remainder(small), ratio = exp_of(-distance);
    const Vec y = near ? remainder - small : ratio - 1.0f, k = near ? remainder : y + distance;
    const Vec x = w * y, l = log_remainder(x), square = v * y * y, light = m * ratio;
    const Vec f = m * ((1.0f + x) * l + w * (square - ratio * k));
    const Vec to_student = m * (student ? l : square + ratio * (l - k));
    const Vec slope = l - x - (student ? zero() : distance);
    return {student ? m : light, student ? light : m, f, f, to_student, slope};
}

template <int KIND>
inline Term term(const Element& e, const Normaliser& n, float beta) {
    const Vec r = e.d + n.c;
    if (KIND == JSD) return mixture_term(e, r, n, beta);
    const Vec p = e.e_s * n.per_student, q = e.e_t * n.per_teacher;
    return KIND == FORWARD_KL ? forward_term(p, q, r) : reverse_term(p, q, r);
}

// Leaves p in z_s, and in z_t r or, for JSD, ln(p/M); on clipped columns CLIPPED or 0. Where p = 0 it may be anything.
// Forward KL needs p and q again and leaves the rows as they are.
template <bool DELTA, int KIND, bool CLIP>
Terms terms_row(float* z_s, float* z_t, const RowOptions& options, const Centre& centre, const Normaliser& normaliser) {
    const RowOptions o = options;  // copies, which no store to a row can change
    const Centre middle = centre;
    const Normaliser n = normaliser;
    const Vec limit = splat(o.clip);
    TermsOf<Wide> lanes;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        TermsOf<Vec> block;
        for_columns(begin, end, [&](int64_t i, int64_t count) {
            const Element e = element_at<DELTA>(z_s + i, z_t + i, count, middle, o.inverse_temperature);
            const Term at = term<KIND>(e, n, o.beta);
            Vec slope = at.slope;
            block.safe += at.safe;
            if (!CLIP) block.part += at.student;
            if (CLIP) {
                const Mask over = at.f > limit;
                const Vec mass = KIND == FORWARD_KL ? at.q : at.p;
                block.value += over ? limit : at.f;
                block.part += over ? zero() : KIND == JSD ? times(at.p, at.slope) : at.f;
                block.kept += over ? zero() : mass;
                block.lost += over ? mass : zero();
                block.student_lost += over ? at.p : zero();
                slope = over ? splat(KIND == JSD ? 0.0f : CLIPPED) : slope;
            }
            if (KIND != FORWARD_KL) {
                store(z_s + i, at.p, count);
                store(z_t + i, slope, count);
            }
        });
        for_each_sum(lanes, block, [](Wide& to, Vec from) { to += widen(from); });
    }
    Terms total;
    for_each_sum(total, lanes, [](double& to, Wide from) { to = sum(from); });
    return total;
}

}  // namespace
}  // namespace OPSD_ISA
