// One row of fused_token_kl, compiled once per instruction set (OPSD_ISA names the namespace): sums, terms where the
// divergence needs them, gradient, results.
#include "row_terms.h"

namespace OPSD_ISA {
namespace {

void reverse_gradient(const float* e_s, const float* d, int64_t vocab, float scale, float shift, float* grad) {
    for_columns(0, vocab, [=](int64_t i, int64_t count) {
        store(grad + i, times(load(e_s + i, count, 0) * scale, load(d + i, count, 0) + shift), count);
    });
}

// kept and lost: the teacher's mass on kept and on clipped columns, 1 and 0 without a clip.
template <bool DELTA, bool CLIP>
void forward_gradient(const float* z_s, const float* z_t, const RowOptions& o, const Centre& centre,
                      const Normaliser& n, float kept, float lost, float scale, float* grad) {
    for_columns(0, o.vocab, [=](int64_t i, int64_t count) {
        const Element e = element_at<DELTA>(z_s + i, z_t + i, count, centre, o.inverse_temperature);
        const Term at = term<FORWARD_KL>(e, n, 0.0f);
        Vec slope = at.slope;
        if (CLIP) {
            const Vec below = lost > 0.5f ? at.p * kept - at.q : slope - at.p * lost;  // equal; the one with digits left
            slope = at.f > splat(o.clip) ? at.p * kept : below;
        }
        store(grad + i, scale * slope, count);
    });
}

template <bool DELTA>
Terms terms_of(float* z_s, float* z_t, const RowOptions& o, const Centre& centre, const Normaliser& n) {
    const bool clips = o.clip < INFINITY;
    if (o.kind == REVERSE_KL) return terms_row<DELTA, REVERSE_KL, true>(z_s, z_t, o, centre, n);
    if (o.kind == FORWARD_KL) return terms_row<DELTA, FORWARD_KL, true>(z_s, z_t, o, centre, n);
    return clips ? terms_row<DELTA, JSD, true>(z_s, z_t, o, centre, n)
                 : terms_row<DELTA, JSD, false>(z_s, z_t, o, centre, n);
}

// From what terms_row left in p and slope: reverse KL and JSD.
void terms_gradient(const float* p, const float* slope, const RowOptions& o, const Terms& terms, float scale,
                    float* grad) {
    if (o.kind == JSD)
        return reverse_gradient(p, slope, o.vocab, scale * (1.0f - o.beta), static_cast<float>(-terms.part), grad);
    const float kept = static_cast<float>(terms.kept), lost = static_cast<float>(terms.lost);
    // p (r + 1 - B) and p (0 - B), B = sum over kept columns of p (r + 1)
    const float part = lost > 0.0f ? static_cast<float>(terms.part) : static_cast<float>(terms.safe);
    const float shift = part - lost, over = -(part + kept);
    for_columns(0, o.vocab, [=](int64_t i, int64_t count) {
        const Vec r = load(slope + i, count, 0);
        store(grad + i, times(load(p + i, count, 0) * scale, r == splat(CLIPPED) ? splat(over) : r - shift), count);
    });
}

// Everything but the value. `token` holds the centred logits of the sampled token, read before the row was consumed.
template <bool DELTA>
RowResult by_products(const RowOptions& o, const Centre& centre, const Sums& sums, const Statistics& st,
                      const Element& token) {
    const double log_student = std::log(sums.student), log_teacher = std::log(st.teacher);
    const float teacher_centre = DELTA ? centre.z_s - centre.second : centre.second;
    RowResult result;
    result.of[STUDENT_ENTROPY] = static_cast<float>(log_student - sums.student_moment / sums.student);
    result.of[TEACHER_ENTROPY] = static_cast<float>(log_teacher - sums.teacher_moment / st.teacher);
    result.of[STUDENT_LSE] = static_cast<float>(centre.z_s * o.inverse_temperature + log_student);
    result.of[TEACHER_LSE] =
        static_cast<float>(teacher_centre * o.inverse_temperature + centre.t_max + log_teacher);
    result.of[TOP1_AGREEMENT] = centre.agrees ? 1.0f : 0.0f;
    result.of[STUDENT_LOGPROB] = static_cast<float>(lane(token.s, 0) - log_student);
    result.of[TEACHER_LOGPROB] = static_cast<float>(lane(token.t, 0) - centre.t_max - log_teacher);
    return result;
}

template <bool DELTA>
RowResult run_row(float* z_s, float* z_t, const RowOptions& o, int64_t token, float scale, float* grad) {
    const Centre centre = find_centre<DELTA>(z_s, z_t, o);
    Element sampled{splat(NAN), splat(NAN)};
    if (token >= 0 && token < o.vocab)
        sampled = element_at<DELTA>(z_s + token, z_t + token, 1, centre, o.inverse_temperature);
    const bool clips = o.clip < INFINITY, needs_terms = clips || o.kind == JSD;
    Sums sums;
    if (o.kind == FORWARD_KL) sums = sum_row<DELTA, FORWARD_KL, false>(z_s, z_t, o, centre);
    else if (o.kind == JSD) sums = sum_row<DELTA, JSD, false>(z_s, z_t, o, centre);
    else if (grad != nullptr && !needs_terms) sums = sum_row<DELTA, REVERSE_KL, true>(z_s, z_t, o, centre);
    else sums = sum_row<DELTA, REVERSE_KL, false>(z_s, z_t, o, centre);
    const Statistics st = finish(sums, centre, o.kind);
    const Normaliser n{static_cast<float>(1.0 / sums.student), static_cast<float>(1.0 / st.teacher),
                       static_cast<float>(st.c), centre.t_max};
    double value = st.value, lost = 0;
    bool may_be_negative = false;
    if (needs_terms) {
        const Terms terms = terms_of<DELTA>(z_s, z_t, o, centre, n);
        may_be_negative = terms.lost > 0 && o.kind != JSD;
        value = may_be_negative || (clips && o.kind == JSD) ? terms.value : terms.safe;
        lost = terms.student_lost;
        if (grad != nullptr && o.kind == FORWARD_KL)
            forward_gradient<DELTA, true>(z_s, z_t, o, centre, n, static_cast<float>(terms.kept),
                                          static_cast<float>(terms.lost), scale, grad);
        else if (grad != nullptr) terms_gradient(z_s, z_t, o, terms, scale, grad);
    } else if (grad != nullptr && o.kind == FORWARD_KL) {
        forward_gradient<DELTA, false>(z_s, z_t, o, centre, n, 1, 0, scale, grad);
    } else if (grad != nullptr) {
        const float shift = static_cast<float>(st.c - st.value);
        reverse_gradient(z_s, z_t, o.vocab, static_cast<float>(scale / sums.student), shift, grad);
    }
    RowResult result = by_products<DELTA>(o, centre, sums, st, sampled);
    result.of[VALUE] = value < 0 && !may_be_negative ? 0.0f : static_cast<float>(value);
    result.of[CLIP_FRACTION] = static_cast<float>(lost);
    if (token < 0) result.of[STUDENT_LOGPROB] = result.of[TEACHER_LOGPROB] = 0.0f;
    return result;
}

}  // namespace

RowResult row(float* z_s, float* z_t, const RowOptions& options, int64_t token, float scale, float* grad) {
    return options.is_delta ? run_row<true>(z_s, z_t, options, token, scale, grad)
                            : run_row<false>(z_s, z_t, options, token, scale, grad);
}

}  // namespace OPSD_ISA
