// The series of MixtureSeries, by interpolation in double at Chebyshev nodes. Both functions are analytic up to
// r = ln(b / (1 - b)) +- i pi, so the same few terms do for every b: relative error below 1e-7 of the slope's
// second-order part, 3e-8 of the value.
#include <cmath>

#include "rows.h"

namespace {

constexpr int TERMS = MixtureSeries::TERMS;

// values[i] at nodes[i] to coefficients of 1, x, x^2, ...: Newton's divided differences, multiplied out
void interpolate(const double (&nodes)[TERMS], double (&values)[TERMS], float (&coefficients)[TERMS]) {
    for (int order = 1; order < TERMS; ++order)
        for (int i = TERMS - 1; i >= order; --i)
            values[i] = (values[i] - values[i - 1]) / (nodes[i] - nodes[i - order]);
    double expanded[TERMS] = {};
    for (int i = TERMS - 1; i >= 0; --i) {
        for (int k = TERMS - 1; k > 0; --k) expanded[k] = expanded[k - 1] - nodes[i] * expanded[k];
        expanded[0] = values[i] - nodes[i] * expanded[0];
    }
    for (int k = 0; k < TERMS; ++k) coefficients[k] = static_cast<float>(expanded[k]);
}

}  // namespace

MixtureSeries mixture_series(double beta) {
    double nodes[TERMS], slope[TERMS], value[TERMS];
    for (int i = 0; i < TERMS; ++i) {
        const double r = MixtureSeries::REACH * std::cos((2 * i + 1) * std::acos(-1.0) / (2 * TERMS));
        const double to_student = -std::log1p(beta * std::expm1(-r)), to_teacher = to_student - r;  // ln(p/M), ln(q/M)
        nodes[i] = r;
        slope[i] = (to_student - beta * r) / (r * r);
        value[i] = ((1 - beta) * to_student + beta * std::exp(-r) * to_teacher) / (r * r);
    }
    MixtureSeries series;
    interpolate(nodes, slope, series.slope);
    interpolate(nodes, value, series.value);
    return series;
}
