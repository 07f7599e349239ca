"""fused_token_kl against fp64, by the rule of cases.check; and broken kernels, which that rule must reject."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import Divergence, fused_token_kl
from opsd_kernels.reference import by_products, token_divergence
from tests.kernels import cases

every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_kind = pytest.mark.parametrize("kind", cases.ALL)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])
def test_within_twice_the_error_of_eager_torch(backend, kind, dtype, shared, trainable):
    inputs, truth, eager = cases.references(kind, dtype, shared)
    function = cases.fused(cases.ALL[kind], backend)
    cases.check(cases.differentiate(function, inputs, trainable), truth, eager, dtype, signed="clipped" in kind)


@every_backend
@every_kind
def test_fp16(backend, kind):
    inputs, truth, eager = cases.references(kind, torch.float16, False)
    cases.check(
        cases.differentiate(cases.fused(cases.ALL[kind], backend), inputs),
        truth,
        eager,
        torch.float16,
        signed="clipped" in kind,
    )


@every_backend
@every_kind
def test_far_teacher(backend, kind):
    """Without the ceiling: where both sides saturate on other tokens, JSD has no gradient left in fp32."""
    inputs = cases.mixture(torch.float32, shared=False)
    far = cases.Inputs(
        *(inputs.student_hidden * 2, inputs.head, inputs.teacher_hidden.flip(0) * 2, inputs.teacher_head),
        inputs.upstream,
    )
    divergence = cases.ALL[kind]
    truth = cases.differentiate(cases.dense(divergence), far.double())
    eager = cases.differentiate(cases.dense(divergence), far)
    found = cases.differentiate(cases.fused(divergence, backend), far)
    cases.check(found, truth, eager, torch.float32, ceiling=torch.inf, signed="clipped" in kind)


@every_backend
def test_by_products(backend):
    inputs = cases.mixture(torch.float32, shared=False)
    divergence = Divergence("jsd", temperature=0.7, clip=1e-3)
    tokens = torch.arange(cases.N) * 7
    operands = (inputs.student_hidden.requires_grad_(), inputs.head, inputs.teacher_hidden, inputs.teacher_head)
    options = {"divergence": divergence, "backend": backend, "return_stats": True}
    _, stats = fused_token_kl(*operands, tokens=tokens, token_weights=inputs.upstream, **options)
    wide = inputs.double()
    z_s, z_t = wide.student_hidden @ wide.head.mT, wide.teacher_hidden @ wide.teacher_head.mT
    truth = by_products(z_s, z_t, divergence, tokens)
    filled = {name: found for name, found in stats._asdict().items() if found is not None}
    assert set(filled) == set(truth)
    for name, found in filled.items():
        torch.testing.assert_close(found.double(), truth[name], rtol=1e-5, atol=1e-5)
        assert found.dtype == torch.float32
        assert not found.requires_grad
    assert 0 < stats.clip_fraction.mean() < 1
    _, stats = fused_token_kl(*operands, **options)
    assert stats.student_logprob is stats.teacher_logprob is None


def _swapped(s, w, t, u, divergence):
    return token_divergence(t @ (w.detach() if u is None else u).mT, s @ w.mT, divergence)


def _teacher_dropped(s, w, t, u, divergence):
    z_s = s @ w.mT
    return token_divergence(z_s, torch.zeros_like(z_s), divergence)


def _last_block_skipped(s, w, t, u, divergence):
    kept = w.shape[0] - 128
    z_t = t @ (w.detach() if u is None else u)[:kept].mT
    return token_divergence(s @ w[:kept].mT, z_t, divergence)


def _clip_ignored(s, w, t, u, divergence):
    free = replace(divergence, clip=None) if divergence.clip else Divergence("reverse_kl", temperature=2.0)
    return token_divergence(s @ w.mT, t @ (w.detach() if u is None else u).mT, free)


FORMULA_MUTANTS = {
    "clip ignored": _clip_ignored,
    "swapped direction": _swapped,
    "teacher term dropped": _teacher_dropped,
    "last vocabulary block skipped": _last_block_skipped,
}


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("mutant", FORMULA_MUTANTS)
@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
def test_a_wrong_formula_is_rejected(kind, dtype, mutant):
    inputs, truth, eager = cases.references(kind, dtype, True)
    # in fp64: only the formula is wrong, and the exact one passes
    cases.check(cases.differentiate(cases.dense(cases.ALL[kind]), inputs.double()), truth, eager, dtype, signed=True)
    wrong = cases.differentiate(lambda *a: FORMULA_MUTANTS[mutant](*a, cases.ALL[kind]), inputs.double())
    for name in wrong:  # value and each gradient on its own gives it away
        with pytest.raises(AssertionError, match=name):
            cases.check({"value": truth["value"], name: wrong[name]}, truth, eager, dtype, signed=True)


@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("factor", [0.0, 2.0, -1.0], ids=["zero", "doubled", "negated"])
@pytest.mark.parametrize("name", ["hidden", "head"])
@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
def test_a_wrong_gradient_is_rejected(kind, dtype, factor, name):
    _, truth, eager = cases.references(kind, dtype, True)
    with pytest.raises(AssertionError, match=name):
        cases.check(truth | {name: truth[name] * factor}, truth, eager, dtype, signed=True)
