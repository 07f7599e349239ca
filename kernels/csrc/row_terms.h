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
    Number part{};            // reverse: p r, JSD: p ln(p/M), of kept columns
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
    Vec p, q;  // q only of the two KLs
    Vec f, safe;
    Vec slope;  // reverse: r, forward: p - q, JSD: ln(p/M)
};

// What turns an element of a row into probabilities and r.
struct Normaliser {
    float per_student, per_teacher, c;
};

// Of the two KLs. Columns with |r| <= 1 have q from p, and no term of first order is subtracted.
template <int KIND>
inline Term ratio_term(Vec p, Vec r, Vec t, const Normaliser& n) {
    const Mask near = magnitude(r) <= splat(1.0f);
    const Vec small = near ? r : zero(), k = exp_remainder(small);
    Vec q = p + p * (k - small), safe, slope;
    if (KIND == FORWARD_KL) {
        safe = p * (small * small - k * (1.0f + small));
        slope = p * (small - k);
    } else {
        safe = p * k;
        slope = r;
    }
    if (!all(near)) q = near ? q : exp_of(t) * n.per_teacher;
    const Vec f = KIND == FORWARD_KL ? -times(q, r) : times(p, r);
    if (!all(near)) {
        safe = near ? safe : f + (KIND == FORWARD_KL ? p - q : q - p);
        if (KIND == FORWARD_KL) slope = near ? slope : p - q;
    }
    return {p, q, f, safe, slope};
}

// JSD where its series ends. Of the heavier side m = max(p, q) only, so that nothing overflows. With w the other side's
// weight in M and u = e^-|r|: M = m (1 + w (u - 1)), and f = -M ln(M/m) - |r| w m u. Beyond a distance of 100 the lighter
// side has no mass left, and a column without mass (r = inf - inf) is put at 0.
inline Term far_mixture(Vec p, Vec r, Vec t, const Normaliser& n, float b) {
    const Mask student = r >= zero();
    const Vec m = student ? p : exp_of(t) * n.per_teacher;
    const Vec w = student ? splat(b) : splat(1.0f - b);
    const Vec distance = m == zero() ? zero() : at_most(magnitude(r), -NO_MASS);
    const Vec u = exp_of(-distance), x = w * (u - 1.0f), log_m = x - log_remainder(x);
    const Vec f = -m * ((1.0f + x) * log_m + distance * w * u);
    return {p, zero(), f, f, (student ? zero() : -distance) - log_m};
}

inline Term mixture_term(Vec p, Vec r, Vec t, const Normaliser& n, float b, const MixtureSeries& series) {
    const Mask near = magnitude(r) <= splat(MixtureSeries::REACH);
    const Vec small = near ? r : zero();
    const Vec f = p * small * small * polynomial(series.value, small);
    const Vec slope = small * (b + small * polynomial(series.slope, small));
    if (all(near)) return {p, zero(), f, f, slope};
    const Term far = far_mixture(p, r, t, n, b);
    const Vec either = near ? f : far.f;
    return {p, zero(), either, either, near ? slope : far.slope};
}

template <int KIND>
inline Term term(Vec e_s, const Logits& z, const Normaliser& n, const RowOptions& o) {
    const Vec p = e_s * n.per_student, r = z.d + n.c;
    if (KIND == JSD) return mixture_term(p, r, z.t, n, o.beta, o.mixture);
    return ratio_term<KIND>(p, r, z.t, n);
}

// From what sum_row left in row.e_s. Leaves the slope in row.grad, unless null: r or, for JSD, ln(p/M); on clipped
// columns CLIPPED or 0. Where p = 0 it may be anything. Forward KL needs the logits again and leaves nothing.
template <bool DELTA, int KIND, bool CLIP>
Terms terms_row(const Row& where, const RowOptions& options, const Centre& centre, const Normaliser& normaliser) {
    const RowOptions o = options;  // copies, which no store to a row can change
    const Row row = where;
    const Centre middle = centre;
    const Normaliser n = normaliser;
    const Vec limit = splat(o.clip);
    TermsOf<Wide> lanes;
    for (int64_t begin = 0; begin < o.vocab; begin += BLOCK) {
        const int64_t end = begin + BLOCK < o.vocab ? begin + BLOCK : o.vocab;
        TermsOf<Vec> block;
        for_columns(begin, end, [&](int64_t i, int64_t count) {
            fetch(row.next_t + i);
            const Logits z = logits_at<DELTA>(row.z_s + i, row.z_t + i, count, middle, o.inverse_temperature);
            const Term at = term<KIND>(load(row.e_s + i, count, 0), z, n, o);
            Vec slope = at.slope;
            block.safe += at.safe;
            if (!CLIP) block.part += times(at.p, at.slope);
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
            if (KIND != FORWARD_KL && row.grad != nullptr) store(row.grad + i, slope, count);
        });
        for_each_sum(lanes, block, [](Wide& to, Vec from) { to += widen(from); });
    }
    Terms total;
    for_each_sum(total, lanes, [](double& to, Wide from) { to = sum(from); });
    return total;
}

}  // namespace
}  // namespace OPSD_ISA
