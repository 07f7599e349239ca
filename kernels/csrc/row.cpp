// One row of fused_token_kl, compiled once per instruction set (OPSD_ISA names the namespace): sums, terms where the
// divergence needs them, gradient, results.
#include "row_terms.h"

namespace OPSD_ISA {
namespace {

// grad = scale e^s (slope + shift), from the slope in row.grad.
void slope_gradient(const Row& row, int64_t vocab, float scale, float shift) {
    const float* e_s = row.e_s;
    float* grad = row.grad;
    for_columns(0, vocab, [=](int64_t i, int64_t count) {
        store(grad + i, times(load(e_s + i, count, 0) * scale, load(grad + i, count, 0) + shift), count);
    });
}

// Of a clipped reverse KL: p (r + 1 - B) and p (0 - B), B = sum over kept columns of p (r + 1)
void clipped_gradient(const Row& row, int64_t vocab, float scale, const Terms& terms) {
    const float kept = static_cast<float>(terms.kept), lost = static_cast<float>(terms.lost);
    const float part = lost > 0.0f ? static_cast<float>(terms.part) : static_cast<float>(terms.safe);
    const float shift = part - lost, over = -(part + kept);
    const float* e_s = row.e_s;
    float* grad = row.grad;
    for_columns(0, vocab, [=](int64_t i, int64_t count) {
        const Vec r = load(grad + i, count, 0);
        store(grad + i, times(load(e_s + i, count, 0) * scale, r == splat(CLIPPED) ? splat(over) : r - shift), count);
    });
}

// kept and lost: the teacher's mass on kept and on clipped columns, 1 and 0 without a clip.
template <bool DELTA, bool CLIP>
void forward_gradient(const Row& where, const RowOptions& options, const Centre& centre, const Normaliser& n,
                      float kept, float lost) {
    const Row row = where;
    const RowOptions o = options;
    for_columns(0, o.vocab, [=](int64_t i, int64_t count) {
        fetch(row.next_t + i);
        const Logits z = logits_at<DELTA>(row.z_s + i, row.z_t + i, count, centre, o.inverse_temperature);
        const Term at = term<FORWARD_KL>(load(row.e_s + i, count, 0), z, n, o);
        Vec slope = at.slope;
        if (CLIP) {
            const Vec below = lost > 0.5f ? at.p * kept - at.q : slope - at.p * lost;  // equal; the one with digits left
            slope = at.f > splat(o.clip) ? at.p * kept : below;
        }
        store(row.grad + i, row.scale * slope, count);
    });
}

template <bool DELTA>
Terms terms_of(const Row& row, const RowOptions& o, const Centre& centre, const Normaliser& n) {
    const bool clips = o.clip < INFINITY;
    if (o.kind == REVERSE_KL) return terms_row<DELTA, REVERSE_KL, true>(row, o, centre, n);
    if (o.kind == FORWARD_KL) return terms_row<DELTA, FORWARD_KL, true>(row, o, centre, n);
    return clips ? terms_row<DELTA, JSD, true>(row, o, centre, n) : terms_row<DELTA, JSD, false>(row, o, centre, n);
}

template <bool DELTA>
void terms_gradient(const Row& row, const RowOptions& o, const Centre& centre, const Normaliser& n, const Terms& terms) {
    const float kept = static_cast<float>(terms.kept), lost = static_cast<float>(terms.lost);
    if (o.kind == FORWARD_KL) return forward_gradient<DELTA, true>(row, o, centre, n, kept, lost);
    const float scale = row.scale * n.per_student;
    if (o.kind == REVERSE_KL) return clipped_gradient(row, o.vocab, scale, terms);
    slope_gradient(row, o.vocab, scale * (1.0f - o.beta), static_cast<float>(-terms.part));
}

// Everything but the value. `token` holds the centred logits of the sampled token, read before the row was consumed.
template <bool DELTA>
RowResult by_products(const RowOptions& o, const Centre& centre, const Sums& sums, const Statistics& st,
                      const Logits& token) {
    const double log_student = std::log(sums.student), log_teacher = std::log(st.teacher);
    const float teacher_top = DELTA ? centre.z_s - centre.top : centre.top;
    RowResult result;
    result.of[STUDENT_ENTROPY] = static_cast<float>(log_student - sums.student_moment / sums.student);
    result.of[TEACHER_ENTROPY] = static_cast<float>(log_teacher - st.teacher_moment / st.teacher);
    result.of[STUDENT_LSE] = static_cast<float>(centre.z_s * o.inverse_temperature + log_student);
    result.of[TEACHER_LSE] = static_cast<float>(teacher_top * o.inverse_temperature + log_teacher);
    result.of[TOP1_AGREEMENT] = centre.agrees ? 1.0f : 0.0f;
    result.of[STUDENT_LOGPROB] = static_cast<float>(lane(token.s, 0) - log_student);
    result.of[TEACHER_LOGPROB] = static_cast<float>(lane(token.t, 0) - log_teacher);
    return result;
}

template <bool DELTA>
RowResult run_row(const Row& row, const RowOptions& o) {
    const Centre centre = find_centre<DELTA>(row.z_s, row.z_t, o);
    Logits sampled{splat(NAN), splat(NAN), splat(NAN)};
    if (row.token >= 0 && row.token < o.vocab)
        sampled = logits_at<DELTA>(row.z_s + row.token, row.z_t + row.token, 1, centre, o.inverse_temperature);
    const bool clips = o.clip < INFINITY, needs_terms = clips || o.kind == JSD, has_grad = row.grad != nullptr;
    Sums sums;
    if (o.kind == FORWARD_KL) sums = sum_row<DELTA, FORWARD_KL, false>(row, o, centre);
    else if (o.kind == JSD) sums = sum_row<DELTA, JSD, false>(row, o, centre);
    else if (has_grad && !needs_terms) sums = sum_row<DELTA, REVERSE_KL, true>(row, o, centre);
    else sums = sum_row<DELTA, REVERSE_KL, false>(row, o, centre);
    const Statistics st = finish(sums, centre, o.kind);
    const Normaliser n{static_cast<float>(1.0 / sums.student), static_cast<float>(1.0 / st.teacher),
                       static_cast<float>(st.c)};
    double value = st.value, lost = 0;
    bool may_be_negative = false;
    if (needs_terms) {
        const Terms terms = terms_of<DELTA>(row, o, centre, n);
        may_be_negative = terms.lost > 0 && o.kind != JSD;
        value = may_be_negative || (clips && o.kind == JSD) ? terms.value : terms.safe;
        lost = terms.student_lost;
        if (has_grad) terms_gradient<DELTA>(row, o, centre, n, terms);
    } else if (has_grad && o.kind == FORWARD_KL) {
        forward_gradient<DELTA, false>(row, o, centre, n, 1, 0);
    } else if (has_grad) {
        slope_gradient(row, o.vocab, static_cast<float>(row.scale / sums.student), static_cast<float>(st.c - st.value));
    }
    RowResult result = by_products<DELTA>(o, centre, sums, st, sampled);
    result.of[VALUE] = value < 0 && !may_be_negative ? 0.0f : static_cast<float>(value);
    result.of[CLIP_FRACTION] = static_cast<float>(lost);
    if (row.token < 0) result.of[STUDENT_LOGPROB] = result.of[TEACHER_LOGPROB] = 0.0f;
    return result;
}

}  // namespace

RowResult run(const Row& row, const RowOptions& options) {
    return options.is_delta ? run_row<true>(row, options) : run_row<false>(row, options);
}

}  // namespace OPSD_ISA
