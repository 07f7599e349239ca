"""Low temperatures: what the rows lose of given fp32 logits, beyond the rounding of the logits themselves."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels.rows import RESULTS
from tests.kernels import cases
from tests.kernels.test_rows import by_products, run, truth

WIDTH = 300 if cases.INTERPRETED else 1200
TEMPERATURES = [1e-3] if cases.INTERPRETED else [1e-2, 1e-3, 1e-4]
SHARED = slice(20, 60)  # columns that both sides have mass on
GAP = 10.0  # about so far is a student's usual logit from its maximum
# Size of logits, temperature, and rows in which rounding takes all of the teacher's maximum, or raises it by e^89
ROUNDED = [(1e3, 1e-6, [24, 27]), (3e3, 1e-6, [7, 32]), (600.0, 1.0287e-6, [1259])]
every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_kind = pytest.mark.parametrize("kind", cases.ALL)


def rows(temperature):
    """(2, WIDTH) student and teacher logits: a, the student's maximum, is nothing to the teacher, who holds half of the
    student's likely columns likely, and in the second row others as well."""
    g = torch.Generator().manual_seed(5)
    z_s = 3 * torch.randn(2, WIDTH, generator=g)
    likely, noise = torch.randn(2, 40, generator=g), torch.randn(2, WIDTH, generator=g)
    z_s[:, SHARED] = z_s.amax(1, keepdim=True) + 1 + 2 * temperature * likely
    z_t = z_s + 2 * temperature * noise
    z_s[:, 20] = z_s.amax(1) + temperature
    z_t[:, 20:40] -= 1.3
    z_t[1, 100:110] = z_t[1, 40:60].amax() + temperature * likely[1, :10]
    return z_s, z_t


def errors(found, gradient, out, expected):
    """Relative ones of every row."""
    value = (out["value"].double() - expected).abs() / expected
    return value, (found.double() - gradient).norm(dim=1) / gradient.norm(dim=1)


@every_backend
@every_kind
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_a_teacher_that_excludes_a_costs_no_digits(backend, kind, temperature):
    z_s, z_t = rows(temperature)
    divergence = replace(cases.ALL[kind], temperature=temperature)
    expected, gradient, _ = truth(z_s, z_t, False, divergence)
    tokens = torch.tensor([20, 105])
    out, found = run(backend, z_s, z_t, False, divergence, tokens=tokens)
    value, slope = errors(found, gradient * temperature, out, expected)
    assert value.max() <= 1e-6, value
    assert slope.max() <= 2e-6, slope
    for name, truly in by_products(z_s.double(), z_t.double(), divergence, tokens).items():
        torch.testing.assert_close(out[name].double(), truly, rtol=1e-6, atol=3e-6)


@every_backend
@every_kind
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_of_a_difference_the_students_gap_is_rounded(backend, kind, temperature):
    """As Divergence states: a teacher given as z_s - delta is exact to 1.2e-7 of the student's gap over T."""
    z_s, z_t = rows(temperature)
    divergence = replace(cases.ALL[kind], temperature=temperature)
    delta = z_s - z_t
    expected, gradient, _ = truth(z_s, delta, True, divergence)
    out, found = run(backend, z_s, delta, True, divergence)
    value, slope = errors(found, gradient * temperature, out, expected)
    allowed = torch.tensor([2e-6, 2e-6 + 1.2e-7 * GAP / temperature])  # in the first row they share all
    assert (value <= allowed).all(), value
    assert (slope <= allowed).all(), slope


@every_backend
@pytest.mark.parametrize("is_delta", [False, True], ids=["pair", "delta"])
def test_a_reverse_kl_much_above_its_gradient_costs_no_digits(backend, is_delta):
    """A teacher sure of a token that the student excludes: r and the KL are 1e4, d and its mean are 1."""
    g = torch.Generator().manual_seed(6)
    z_s = 1e-3 * torch.randn(2, WIDTH, generator=g)
    delta = 1e-3 * torch.randn(2, WIDTH, generator=g)
    z_s[:, 7], delta[:, 7] = -GAP, -2 * GAP
    second = delta if is_delta else z_s - delta
    divergence = replace(cases.ALL["reverse_kl"], temperature=1e-3)
    expected, gradient, _ = truth(z_s, second, is_delta, divergence)
    out, found = run(backend, z_s, second, is_delta, divergence)
    value, slope = errors(found, gradient * 1e-3, out, expected)
    assert value.max() <= 1e-6, value
    assert slope.max() <= 2e-6, slope


@every_backend
@every_kind
@pytest.mark.parametrize("is_delta", [False, True], ids=["pair", "delta"])
@pytest.mark.parametrize("rounded", ROUNDED, ids=str)
def test_sides_beyond_the_digits_of_fp32_are_finite(backend, kind, is_delta, rounded):
    """Over 1e9 T from each other, where the roundings of the teacher's logits alone are 60 T and more."""
    size, temperature, chosen = rounded
    g = torch.Generator().manual_seed(3)
    z_s, z_t = (size * torch.randn(2, 2000, 20, generator=g)).clamp_min(-9e3)[:, chosen]  # the definition ends at -1e4
    divergence = replace(cases.ALL[kind], temperature=temperature)
    second = z_s - z_t if is_delta else z_t
    out, found = run(backend, z_s, second, is_delta, divergence, tokens=torch.zeros(len(z_s), dtype=torch.int64))
    assert found.isfinite().all()
    assert all(out[name].isfinite().all() for name in RESULTS)
    if not is_delta:  # of a difference no digits are left
        expected, _, _ = truth(z_s, z_t, False, divergence)
        torch.testing.assert_close(out["value"].double(), expected, rtol=1e-6, atol=0)


@every_backend
@every_kind
@pytest.mark.parametrize("is_delta", [False, True], ids=["pair", "delta"])
@pytest.mark.parametrize("distance", [29.0, 31.0, 95.0, 1e4])  # exp(95) is beyond fp32, exp(-95) is not nothing there
def test_a_teacher_who_all_but_excludes_one_of_two_tokens(backend, kind, is_delta, distance):
    z_s = torch.tensor([[0.0, -1.0]])
    z_t = torch.tensor([[-distance, 0.0]])
    expected, gradient, _ = truth(z_s, z_t, False, cases.ALL[kind])
    out, found = run(backend, z_s, z_s - z_t if is_delta else z_t, is_delta, cases.ALL[kind])
    torch.testing.assert_close(out["value"].double(), expected, rtol=1e-6, atol=2e-7)
    torch.testing.assert_close(found.double(), gradient * cases.ALL[kind].temperature, rtol=2e-6, atol=2e-7)


@every_backend
@every_kind
@pytest.mark.parametrize("is_delta", [False, True], ids=["pair", "delta"])
def test_a_sure_teacher_of_an_unsure_student(backend, kind, is_delta):
    """Q / S is 1 in 3000: so much less is known of Q - S."""
    g = torch.Generator().manual_seed(7)
    z_s = 0.01 * torch.randn(2, 3000, generator=g)
    second = z_s + torch.randn(2, 3000, generator=g)
    second[range(2), z_s.argmax(1)] += 25
    expected, gradient, _ = truth(z_s, z_s - second if is_delta else second, is_delta, cases.ALL[kind])
    out, found = run(backend, z_s, z_s - second if is_delta else second, is_delta, cases.ALL[kind])
    value, slope = errors(found, gradient * cases.ALL[kind].temperature, out, expected)
    assert value.max() <= 1e-6, value
    assert slope.max() <= 6e-6, slope  # of next to nothing for most columns
