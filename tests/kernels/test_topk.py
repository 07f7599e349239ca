"""Top-k supports: value, gradient and statistics against the dense definition in fp64, and the bound of the tail."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import Divergence, TopK, fused_token_kl
from opsd_kernels.reference import by_products, token_divergence
from opsd_kernels.rows import RowOutputs, results_of, row_kernel
from tests.kernels import cases
from tests.kernels.test_op import PeakBytes, gradients

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="gathered outside the row kernel")
every_backend = pytest.mark.parametrize("backend", ["native", "torch"])
every_kind = pytest.mark.parametrize("kind", cases.ALL)
every_support = pytest.mark.parametrize(
    "support",
    [TopK(20), TopK(20, of="teacher"), TopK(20, tail=False), TopK(7, tail=False, of="teacher")],
    ids=["student's + tail", "teacher's + tail", "student's", "teacher's"],
)


@every_backend
@every_kind
@every_support
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_within_twice_the_error_of_eager_torch(backend, kind, support, shared, dtype):
    divergence = replace(cases.ALL[kind], support=support)
    inputs = cases.mixture(dtype, shared)
    truth = cases.differentiate(cases.dense(divergence), inputs.double())
    eager = cases.differentiate(cases.dense(divergence), inputs)
    found = cases.differentiate(cases.fused(divergence, backend), inputs)
    frozen = cases.differentiate(cases.fused(divergence, backend), inputs, trainable=False)
    assert all(torch.equal(frozen[name], found[name]) for name in frozen)
    if not support.tail:  # tokens that no row has among its k: their gradient is 0, in fp64 only almost
        sizes = truth["head"].norm(dim=1)
        never = sizes < 1e-12 * sizes.max()
        assert never.any()
        assert not found["head"][never].any()
        truth, eager, found = (results | {"head": results["head"][~never]} for results in (truth, eager, found))
    cases.check(found, truth, eager, dtype, signed="clipped" in kind)


MUTANTS = {
    "none": None,
    "other side": TopK(20, of="teacher"),
    "one token more": TopK(21),
    "no tail": TopK(20, tail=False),
}


@pytest.mark.parametrize("mutant", MUTANTS)
@pytest.mark.parametrize("kind", cases.DIVERGENCES)
def test_another_support_is_rejected(kind, mutant):
    inputs, divergence = cases.mixture(torch.float32, False), replace(cases.ALL[kind], support=TopK(20))
    truth = cases.differentiate(cases.dense(divergence), inputs.double())
    eager = cases.differentiate(cases.dense(divergence), inputs)
    wrong = cases.differentiate(cases.dense(replace(divergence, support=MUTANTS[mutant])), inputs.double())
    for name in wrong:
        with pytest.raises(AssertionError, match=name):
            cases.check({"value": truth["value"], name: wrong[name]}, truth, eager, torch.float32)


@every_backend
@every_kind
@every_support
def test_statistics(backend, kind, support):
    inputs = cases.mixture(torch.float32, shared=False)
    divergence = replace(cases.ALL[kind], support=support)
    tokens = torch.arange(cases.N) * 7
    operands = (inputs.student_hidden, inputs.head, inputs.teacher_hidden, inputs.teacher_head)
    value, stats = fused_token_kl(*operands, tokens=tokens, divergence=divergence, backend=backend, return_stats=True)
    wide = inputs.double()
    z_s, z_t = wide.student_hidden @ wide.head.mT, wide.teacher_hidden @ wide.teacher_head.mT
    for name, truth in by_products(z_s, z_t, divergence, tokens).items():
        torch.testing.assert_close(getattr(stats, name).double(), truth, rtol=1e-5, atol=1e-5)
    assert 0 < stats.student_tail_mass.mean() < 1
    if support.tail and divergence.clip is None:
        assert (value <= stats.full_divergence * (1 + 1e-5)).all(), "merging outcomes cannot tell the sides apart"
        assert value.sum() < 0.999 * stats.full_divergence.sum()


def test_without_a_support_nothing_is_left_out():
    inputs = cases.mixture(torch.float32, shared=True)
    _, stats = fused_token_kl(inputs.student_hidden, inputs.head, inputs.teacher_hidden, return_stats=True)
    assert stats.full_divergence is stats.student_tail_mass is stats.teacher_tail_mass is None


@every_backend
@every_kind
@pytest.mark.parametrize("support", [TopK(cases.V), TopK(cases.V, tail=False)], ids=["tail", "no tail"])
def test_all_tokens_are_the_whole_vocabulary(backend, kind, support):
    inputs, divergence = cases.mixture(torch.float32, shared=True), cases.ALL[kind]
    whole = gradients(backend, inputs, torch.sum, divergence=divergence)
    found = gradients(backend, inputs, torch.sum, divergence=replace(divergence, support=support))
    for a, b in zip(found, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5 * b.abs().max().item())


@every_backend
@pytest.mark.parametrize("kind", cases.DIVERGENCES)
@every_support
def test_identical_teacher_gives_exactly_zero(backend, kind, support):
    inputs = cases.mixture(torch.float32, shared=True)
    student = inputs.student_hidden.requires_grad_()
    divergence = Divergence(kind, temperature=1.7, support=support)
    for teacher_head in (None, inputs.head.clone()):
        value = fused_token_kl(student, inputs.head, student, teacher_head, divergence=divergence, backend=backend)
        (grad,) = torch.autograd.grad(value.sum(), student)
        assert not value.any()
        assert not grad.any()


@every_backend
@pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "pair"])
def test_a_tail_that_one_side_or_none_has(backend, is_delta):
    """-inf outside S: nothing is left out, or all of it by the teacher, which reverse KL cannot bear."""
    from opsd_kernels.rows import APPROXIMATED, RESULTS, RowOutputs, row_kernel

    z_s, z_t = torch.full((4, 50), -torch.inf), torch.full((4, 50), -torch.inf)
    z_s[:, :4], z_t[:, :4] = torch.arange(4.0), torch.arange(4.0) + 0.1 * torch.randn(4, 4)
    z_s[2, 4:] = -1.0
    if not is_delta:  # a difference of -inf says nothing about the teacher
        z_t[3, 4:] = -1.0
    values = {}
    for kind in cases.DIVERGENCES:
        divergence = Divergence(kind, beta=0.3, support=TopK(4))
        kernel = row_kernel(backend, torch.device("cpu"), divergence, None, 1)
        second = torch.where(z_s == z_t, 0.0, z_s - z_t) if is_delta else z_t
        out, grad = RowOutputs(torch.full((len(RESULTS + APPROXIMATED), 4), torch.nan)), torch.full_like(z_s, torch.nan)
        kernel.run(z_s.clone(), second.clone(), is_delta, divergence, torch.ones(4), grad, out, None)
        values[kind] = out["value"]
        assert grad[:2].isfinite().all()
        assert not grad[:2, 4:].any()
        assert out["student_tail_mass"].tolist()[:2] == [0, 0]
        if kind == "reverse_kl":
            rows = [0, 1, 3]
            log_p, log_q = (x[rows].double().log_softmax(-1)[:, :4] for x in (z_s, z_t))
            truth = (log_p.exp() * (log_p - log_q)).sum(-1)
            torch.testing.assert_close(out["value"][rows].double(), truth, rtol=1e-5, atol=1e-7)
    assert values["reverse_kl"][2] == torch.inf
    assert values["forward_kl"][:3].isfinite().all()
    assert is_delta or values["forward_kl"][3] == torch.inf
    assert values["jsd"].isfinite().all()


@every_backend
@pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "pair"])
@pytest.mark.parametrize("kind", cases.DIVERGENCES)
def test_a_tail_with_all_of_one_side_and_nothing_of_the_other(backend, is_delta, kind):
    from opsd_kernels.rows import APPROXIMATED, RESULTS, RowOutputs, row_kernel

    z_s = torch.linspace(-1, 1, 100).reshape(2, 50)
    z_t = z_s + 0.5 * torch.linspace(1, -1, 50)
    z_s[0, 4:] -= 60
    z_t[0, 4:] += 20
    z_s[1, 4:] += 15
    z_t[1, 4:] -= 60
    divergence = Divergence(kind, beta=0.3, support=TopK(4))
    expected = token_divergence(z_s.double(), z_t.double(), divergence)
    kernel = row_kernel(backend, torch.device("cpu"), divergence, None, 1)
    out = RowOutputs(torch.full((len(RESULTS + APPROXIMATED), 2), torch.nan))
    kernel.run(z_s.clone(), z_s - z_t if is_delta else z_t, is_delta, divergence, torch.ones(2), None, out, None)
    torch.testing.assert_close(out["value"].double(), expected, rtol=1e-5, atol=1e-6)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_memory_stays_in_the_workspace(backend, dtype):
    n, vocab, width, mib = 3000, 2003, 32, 30 if backend == "torch" else 6
    inputs = cases.mixture(dtype, shared=False, n=n, vocab=vocab, width=width)
    student = inputs.student_hidden.requires_grad_()
    with PeakBytes() as memory:
        fused_token_kl(
            *(student, inputs.head, inputs.teacher_hidden, inputs.teacher_head),
            divergence=Divergence(support=TopK(20)),
            backend=backend,
            workspace_mib=mib,
        ).sum().backward()
    assert memory.largest < n * vocab * 4, "a tensor of [tokens, vocabulary] was made"
    assert memory.peak <= mib * 2**20 + n * width * 8 + n * 4 * 12


def test_more_tokens_than_there_are():
    sides, divergence = (torch.zeros(2, 3), torch.zeros(5, 3), torch.zeros(2, 3)), Divergence(support=TopK(6))
    with pytest.raises(ValueError, match="within the vocabulary, 5, got 6"):
        fused_token_kl(*sides, divergence=divergence)


@every_backend
@pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "pair"])
def test_the_others_of_a_teacher_that_is_sure_of_another_token(backend, is_delta):
    """Its maximum, kept, is far above all that is shared: of the others both sides still have digits."""
    g = torch.Generator().manual_seed(6)
    z_s = 3 * torch.randn(2, 300, generator=g)
    z_t = z_s + 0.5 * torch.randn(2, 300, generator=g)
    z_t[:, 7] = z_t.amax(1) + 45
    divergence = Divergence("reverse_kl", support=TopK(20, tail=True, of="teacher"))
    second = z_s - z_t if is_delta else z_t
    out = RowOutputs(torch.full((len(results_of(divergence)), 2), torch.nan))
    kernel, slope = row_kernel(backend, z_s.device, divergence, None, 512.0), torch.empty_like(z_s)
    exact = z_s.double().requires_grad_()
    expected = token_divergence(exact, exact.detach() - second if is_delta else z_t.double(), divergence)
    expected.sum().backward()
    kernel.run(z_s.clone(), second.clone(), is_delta, divergence, torch.ones(2), slope, out, None)
    torch.testing.assert_close(out["value"].double(), expected.detach(), rtol=2e-6, atol=0)
    allowed = 2e-6 * exact.grad.norm(dim=1) + 1e-7 * expected  # as Divergence states
    assert ((slope - exact.grad).norm(dim=1) <= allowed).all()
