"""Operands as they come: masks, tokens left out, strides, nothing at all."""

import pytest
import torch

from opsd_kernels import Divergence, Head, TopK, autograd, fused_token_kl
from tests.kernels import cases
from tests.kernels.test_op import Reads

every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
DIVERGENCES = cases.DIVERGENCES | {"clipped": cases.CLIPPED["clipped jsd"], "top-k": Divergence(support=TopK(9))}
every_kind = pytest.mark.parametrize("kind", DIVERGENCES)


def differentiate(student, weight, teacher, weights=None, upstream=None, **options):
    """Value and the gradients of hidden states, weight and bias."""
    leaves = [x.clone(memory_format=torch.preserve_format).requires_grad_() for x in (student, weight)]
    bias = torch.linspace(-1, 1, len(weight), dtype=torch.float32).to(weight.dtype).requires_grad_()
    value = fused_token_kl(leaves[0], Head(leaves[1], bias), teacher, token_weights=weights, **options)
    (value.sum() if upstream is None else (value * upstream).sum()).backward()
    return [value.detach(), *(x.grad for x in (*leaves, bias))]


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_token_that_a_mask_leaves_out_may_hold_nan(backend, kind, dtype):
    """Its neighbours do not notice, to the bit; nor do the gradients of the head."""
    inputs = cases.mixture(dtype, shared=True, n=6)
    mask = torch.tensor([True, False, True, False, True, True])
    student, teacher = inputs.student_hidden.clone(), inputs.teacher_hidden.clone()
    options = {"weights": mask, "divergence": DIVERGENCES[kind], "backend": backend}
    clean = differentiate(student, inputs.head, teacher, **options)
    student[1], teacher[3] = torch.nan, torch.inf
    found = differentiate(student, inputs.head, teacher, **options)
    for a, b in zip(found, clean, strict=True):
        assert torch.equal(a, b)
    assert not found[0][~mask].any()
    assert not found[1][~mask].any()
    assert found[1][mask].any(dim=1).all()


@every_backend
@every_kind
def test_a_bool_mask_is_weights_of_0_and_1(backend, kind):
    inputs = cases.mixture(torch.float32, shared=False)
    mask = torch.arange(cases.N) % 3 > 0
    sides = (inputs.student_hidden, inputs.head, inputs.teacher_hidden)
    options = {"divergence": DIVERGENCES[kind], "backend": backend, "upstream": inputs.upstream}
    for a, b in zip(
        differentiate(*sides, weights=mask, **options),
        differentiate(*sides, weights=mask.double(), **options),
        strict=True,
    ):
        assert torch.equal(a, b)


@pytest.mark.skipif(cases.INTERPRETED, reason="the torch rows stand for every row kernel's host side")
@every_kind
def test_a_mask_is_not_read_on_the_host(kind, monkeypatch):
    monkeypatch.setattr(autograd, "on_host", lambda x: False)
    inputs = cases.mixture(torch.bfloat16, shared=True, n=5)
    mask = torch.arange(5) > 2
    with Reads():
        differentiate(
            *(inputs.student_hidden, inputs.head, inputs.teacher_hidden),
            weights=mask,
            divergence=DIVERGENCES[kind],
            backend="torch",
        )


@every_backend
@every_kind
@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "sum"])
def test_an_empty_mask(backend, kind, upstream):
    inputs = cases.mixture(torch.float32, shared=True, n=3)
    results = differentiate(
        *(inputs.student_hidden, inputs.head, inputs.teacher_hidden, torch.zeros(3, dtype=torch.bool)),
        upstream=inputs.upstream if upstream else None,
        divergence=DIVERGENCES[kind],
        backend=backend,
    )
    assert not any(result.any() for result in results)


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_no_tokens(backend, kind, dtype):
    inputs = cases.mixture(dtype, shared=True, n=0)
    sides = (inputs.student_hidden, inputs.head, inputs.teacher_hidden)
    options = {"divergence": DIVERGENCES[kind], "backend": backend}
    for weights, upstream in ((None, None), (torch.zeros(0), torch.zeros(0))):
        value, hidden, weight, bias = differentiate(*sides, weights=weights, upstream=upstream, **options)
        assert (value.shape, value.dtype) == ((0,), torch.float32)
        assert hidden.shape == (0, cases.D)
        assert weight.shape == inputs.head.shape and not weight.any()
        assert bias.shape == (cases.V,) and not bias.any()
    _, stats = fused_token_kl(*sides, **options, tokens=torch.zeros(0, dtype=torch.int64), return_stats=True)
    assert all(x is None or x.shape == (0,) for x in stats)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_strides_are_free(backend, dtype):
    """Transposed, cut out, expanded: the numbers count, not where they lie."""
    inputs = cases.mixture(dtype, shared=True)
    plain = (inputs.student_hidden, inputs.head, inputs.teacher_hidden[:1].repeat(cases.N, 1))
    wide = torch.cat([inputs.head, inputs.head], dim=1)
    strided = (
        *(inputs.student_hidden.mT.contiguous().mT, wide[:, : cases.D]),
        inputs.teacher_hidden[:1].expand(cases.N, -1),
    )
    assert not any(x.is_contiguous() for x in strided)
    weights = torch.stack([inputs.upstream, inputs.upstream], dim=1)[:, 0]
    options = {"backend": backend, "tokens": torch.arange(2 * cases.N)[::2], "upstream": inputs.upstream}
    expected = differentiate(*plain, weights=inputs.upstream, **options)
    for found, truth in zip(differentiate(*strided, weights=weights, **options), expected, strict=True):
        assert (found - truth).float().norm() <= (1e-6 if dtype == torch.float32 else 1e-2) * truth.float().norm()


@every_backend
@pytest.mark.parametrize("support", [None, TopK(9)], ids=["whole", "top-k"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_default_dtype_of_the_program_changes_nothing(backend, support, dtype):
    """A row kernel writes fp32 through pointers: past the end of a table in half precision."""
    inputs = cases.mixture(dtype, shared=True, n=5)
    sides = (inputs.student_hidden, inputs.head, inputs.teacher_hidden)
    options = {"divergence": Divergence("jsd", support=support), "backend": backend, "upstream": inputs.upstream}
    expected = differentiate(*sides, **options)
    default = torch.get_default_dtype()
    for other in (torch.float64, torch.bfloat16):
        try:
            torch.set_default_dtype(other)
            found = differentiate(*sides, **options)
        finally:
            torch.set_default_dtype(default)
        for a, b in zip(found, expected, strict=True):
            assert a.dtype == b.dtype and torch.equal(a, b)
