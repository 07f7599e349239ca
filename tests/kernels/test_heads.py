"""Bias, scale, softcap, padding, a temperature per side: against fp64, by the rule of cases.check."""

from dataclasses import replace

import pytest
import torch

from opsd_kernels import Divergence, Head, fused_token_kl
from opsd_kernels.heads import is_same
from opsd_kernels.reference import dense_token_kl
from opsd_kernels.sweep import Operands
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="the row kernels see logits either way")
every_backend = pytest.mark.parametrize("backend", ["native", "torch"])
# options of both heads, those that the teacher's has instead, and of the divergence
FORMS = {
    "bias": ({"bias": True}, None, {}),
    "scale": ({"scale": 0.7}, None, {}),
    "softcap": ({"softcap": 4.0}, None, {}),
    "all": ({"bias": True, "scale": 1.3, "softcap": 6.0}, None, {}),
    "separate": ({"bias": True}, {"softcap": 5.0, "scale": 0.8}, {}),
    "temperatures": ({"scale": 0.9}, None, {"temperature": 1.2, "teacher_temperature": 0.8}),
    "padded": ({"bias": True, "valid_vocab": cases.V - 75}, None, {}),
}


def heads(inputs, form, student_head, student_bias):
    """Both heads in the dtype of student_head: fp64 for the truth."""
    options, teacher_options, _ = FORMS[form]
    make = lambda weight, bias, o: Head(weight, **(o | {"bias": bias if "bias" in o else None}))  # noqa: E731
    student = make(student_head, student_bias, options)
    if teacher_options is None:
        return student, None
    return student, make(inputs.teacher_head, None, teacher_options)


def differentiate(function, inputs, form, divergence, trainable=True):
    student = inputs.student_hidden.clone().requires_grad_()
    weight = inputs.head.clone().requires_grad_(trainable)
    bias = (torch.arange(cases.V).remainder(7).sub(3) / 4).to(weight.dtype).requires_grad_()
    head, teacher_head = heads(inputs, form, weight, bias)
    value = function(student, head, inputs.teacher_hidden, teacher_head, divergence)
    (value * inputs.upstream.to(value.dtype)).sum().backward()
    results = {"value": value.detach(), "hidden": student.grad}
    if trainable:
        results["head"] = weight.grad
    return results | ({"bias": bias.grad} if head.bias is not None else {})


@every_backend
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", ["reverse_kl", "clipped jsd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_within_twice_the_error_of_eager_torch(backend, form, kind, dtype):
    inputs = cases.mixture(dtype, shared=False)
    divergence = replace(cases.ALL[kind], **FORMS[form][2])
    truth = differentiate(dense_token_kl, inputs.double(), form, divergence)
    eager = differentiate(dense_token_kl, inputs, form, divergence)
    fused = lambda *a: fused_token_kl(*a[:4], divergence=a[4], backend=backend)  # noqa: E731
    found = differentiate(fused, inputs, form, divergence)
    cases.check(found, truth, eager, dtype, signed=True)
    frozen = differentiate(fused, inputs, form, divergence, trainable=False)
    assert all(torch.equal(frozen[name], found[name]) for name in frozen)
    if "valid_vocab" in FORMS[form][0]:
        assert not found["head"][cases.V - 75 :].any()
        assert not found["bias"][cases.V - 75 :].any()


@pytest.mark.parametrize("form", FORMS)
def test_a_form_that_is_ignored_is_rejected(form):
    """A plain head instead of each form: the rule above must see it."""
    inputs, divergence = cases.mixture(torch.float32, shared=False), replace(Divergence(), **FORMS[form][2])
    truth = differentiate(dense_token_kl, inputs.double(), form, divergence)
    eager = differentiate(dense_token_kl, inputs, form, divergence)
    plain = lambda s, w, t, u, d: dense_token_kl(s, w.weight, t, u and u.weight, Divergence())  # noqa: E731
    wrong = differentiate(plain, inputs.double(), "separate" if FORMS[form][1] else "scale", divergence)
    for name in [name for name in wrong if wrong[name] is not None]:
        with pytest.raises(AssertionError, match=name):
            cases.check({"value": truth["value"], name: wrong[name]}, truth, eager, torch.float32, signed=True)


@every_backend
def test_uniform_upstream_scales_the_bias_gradient(backend):
    inputs = cases.mixture(torch.float32, shared=True)
    results = []
    for reduce in (lambda v: v.mean(), lambda v: (v * torch.linspace(1, 1 + 1e-7, len(v))).sum() / len(v)):
        bias = torch.zeros(cases.V, requires_grad=True)
        reduce(
            fused_token_kl(inputs.student_hidden, Head(inputs.head, bias), inputs.teacher_hidden, backend=backend)
        ).backward()
        results.append(bias.grad)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-9)


@every_backend
@pytest.mark.parametrize("form", ["bias", "scale", "all", "padded"])
def test_identical_teacher_gives_exactly_zero(backend, form):
    inputs = cases.mixture(torch.float32, shared=True)
    student = inputs.student_hidden.requires_grad_()
    head, _ = heads(inputs, form, inputs.head, torch.randn(cases.V))
    value = fused_token_kl(student, head, student, backend=backend)
    value.sum().backward()
    assert not value.any()
    assert not student.grad.any()


@every_backend
def test_padding_is_never_read(backend):
    inputs = cases.mixture(torch.float32, shared=False)
    kept = cases.V - 75
    padded = inputs.head.clone()
    padded[kept:] = torch.nan
    sides = (inputs.student_hidden, inputs.teacher_hidden)
    options = {"backend": backend, "divergence": "jsd"}
    value = fused_token_kl(sides[0], Head(padded, valid_vocab=kept), sides[1], inputs.teacher_head[:kept], **options)
    alone = fused_token_kl(sides[0], inputs.head[:kept], sides[1], inputs.teacher_head[:kept], **options)
    assert torch.equal(value, alone)


@every_backend
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.bfloat16, torch.float32)], ids=str)
def test_sides_of_another_width_and_dtype(backend, dtypes):
    inputs, other = cases.mixture(dtypes[0], shared=True), cases.mixture(dtypes[1], shared=True, width=32)
    sides = replace(inputs, teacher_hidden=other.student_hidden, teacher_head=other.head)
    truth = cases.differentiate(cases.dense(Divergence("jsd")), sides.double())
    found = cases.differentiate(cases.fused(Divergence("jsd"), backend), sides)
    wide = replace(sides, teacher_hidden=sides.teacher_hidden.float(), teacher_head=sides.teacher_head.float())
    eager = cases.differentiate(cases.dense(Divergence("jsd")), wide)
    # unlike teachers are far ones: no ceiling, see test_far_teacher
    cases.check(found, truth, eager, dtypes[0], ceiling=torch.inf if dtypes[0] == torch.float32 else None)


def test_difference_is_one_product_only_where_both_sides_are_the_same_linear_function():
    weight, other, bias = torch.zeros(5, 3), torch.zeros(5, 3), torch.zeros(5)
    plain = Divergence()

    def is_delta(a, b, divergence=plain):
        return Operands(weight, a, weight, b, divergence, None, 1).is_delta

    assert is_delta(Head(weight), Head(weight.detach()))
    assert is_delta(Head(weight, bias, 2.0), Head(weight, bias, 2.0))
    assert is_delta(Head(weight, scale=2.0), Head(weight, scale=2.0), Divergence(temperature=3.0))
    assert not is_delta(Head(weight), Head(other))
    assert not is_delta(Head(weight, bias), Head(weight))
    assert not is_delta(Head(weight, scale=2.0), Head(weight))
    assert not is_delta(Head(weight, softcap=2.0), Head(weight, softcap=2.0))
    assert not is_delta(Head(weight), Head(weight), Divergence(teacher_temperature=2.0))


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_same_memory_is_recognised_without_addresses(device):
    """Every address is 0 on meta, and of what has no elements."""
    x, other = torch.zeros(6, 4, device=device), torch.zeros(6, 4, device=device)
    assert is_same(x, x) and is_same(x, x.detach()) and is_same(x[2:], x.detach()[2:]) and is_same(None, None)
    assert not is_same(x, other) and not is_same(x, None) and not is_same(x[:2], x[2:4]) and not is_same(x[:3], x)
    assert not is_same(x[:4], x[:4].mT) and not is_same(x, x.view(torch.int32))
    assert not is_same(torch.zeros(0, 4, device=device), torch.zeros(0, 4, device=device))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bias": torch.zeros(1002)}, r"expected the bias of head of shape \(1003,\)"),
        ({"bias": torch.zeros(1003, dtype=torch.int64)}, "floating-point"),
        ({"valid_vocab": 1004}, "expected 0 < valid_vocab <= 1003"),
        ({"valid_vocab": 900}, "expected teacher_head with the vocabulary of head, 900, got 1003"),
    ],
)
def test_refusals(options, message):
    inputs = cases.mixture(torch.float32, shared=False)
    with pytest.raises(ValueError, match=message):
        fused_token_kl(inputs.student_hidden, Head(inputs.head, **options), inputs.teacher_hidden, inputs.teacher_head)


def test_a_head_of_another_type():
    with pytest.raises(ValueError, match="expected a head as a tensor or a Head, got Linear"):
        fused_token_kl(torch.zeros(2, 3), torch.nn.Linear(3, 5), torch.zeros(2, 3))
