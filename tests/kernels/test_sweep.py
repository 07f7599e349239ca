"""A sweep in many chunks, slabs and gradient groups: every result lands at its own tokens, columns and sides."""

from types import SimpleNamespace

import pytest
import torch

from opsd_kernels import Divergence, Head, TopK, autograd, fused_token_kl, gemm, rows_torch, sweep
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the row kernel")
N = 140
DIVERGENCES = {
    "whole": Divergence("jsd", beta=0.3, temperature=1.3, clip=1e-3),
    "two temperatures": Divergence("forward_kl", temperature=1.3, teacher_temperature=0.9),
    "top-k": Divergence("reverse_kl", support=TopK(9)),
    "top-k, no tail": Divergence("reverse_kl", support=TopK(9, tail=False, of="teacher")),
}


def everything(dtype, shared, softcap=None, **options):
    """Every result that a call has, by name: no two tokens or columns have the same."""
    inputs = cases.mixture(dtype, shared, n=N)
    g = torch.Generator().manual_seed(3)
    leaves = [x.clone().requires_grad_() for x in (inputs.student_hidden, inputs.head, inputs.head[:, 0])]
    teacher = None if shared else Head(inputs.teacher_head, valid_vocab=cases.V - 3)
    value, stats = fused_token_kl(
        *(leaves[0], Head(*leaves[1:], softcap=softcap, valid_vocab=cases.V - 3), inputs.teacher_hidden, teacher),
        token_weights=torch.rand(N, generator=g) + 0.5,
        tokens=torch.randint(cases.V - 3, (N,), generator=g),
        return_stats=True,
        **options,
    )
    grads = torch.autograd.grad(value.sum(), leaves)
    return {"value": value.detach()} | stats._asdict() | dict(zip(("hidden", "weight", "bias"), grads, strict=True))


def assert_same(found, expected, tolerance):
    for name, truth in expected.items():
        if truth is not None:
            assert (found[name] - truth).norm() <= tolerance * truth.norm(), name


@pytest.mark.parametrize("backend", cases.BACKENDS)
@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("form", ["shared", "separate", "softcap"])
def test_many_chunks_are_one(backend, kind, form, monkeypatch):
    options = {"shared": form != "separate", "softcap": 5.0 if form == "softcap" else None}
    options |= {"divergence": DIVERGENCES[kind], "backend": backend}
    expected = everything(torch.float32, **options)
    monkeypatch.setattr(rows_torch, "SLAB", 3 * cases.V)
    plans, plan = [], sweep.plan
    monkeypatch.setattr(sweep, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    found = everything(torch.float32, workspace_mib=0.55, **options)
    assert len(plans[0][0].groups()) > 2
    assert_same(found, expected, 1e-5)


@pytest.mark.parametrize("form", ["shared", "separate", "softcap"])
def test_gradient_rows_collected_over_chunks(form, monkeypatch):
    """As on CUDA in bf16: half gradients of several chunks, beside the logits, meet in one product."""
    options = {"shared": form != "separate", "softcap": 5.0 if form == "softcap" else None, "backend": "torch"}
    expected = everything(torch.bfloat16, **options)

    def into(total, grad, hidden, add):
        product = grad.float().mT @ hidden.float()
        total.add_(product) if add else total.copy_(product)

    monkeypatch.setattr(gemm, "gradient_dtype", lambda head: torch.bfloat16)
    monkeypatch.setattr(gemm, "head_gradient_into", into)  # products with fp32 results are CUDA's
    monkeypatch.setattr(rows_torch, "scratch_bytes", lambda vocab: 0)
    plans, plan = [], sweep.plan
    monkeypatch.setattr(sweep, "plan", lambda *a, **k: plans.append(plan(*a, **k)) or plans[-1])
    found = everything(torch.bfloat16, workspace_mib=0.35, **options)
    chunks = plans[0][0]
    assert len(chunks.groups()) > 1 and len(chunks.chunks(*chunks.groups()[0])) > 1
    assert_same(found, expected, 1e-2)


def test_only_bf16_on_cuda_keeps_half_gradients():
    """fp16 has no room for p * r. What has no GPU sees it in the choice alone."""
    for is_cuda, dtype, widened, gradient in (
        (True, torch.bfloat16, False, torch.bfloat16),
        (True, torch.float16, True, torch.float32),
        (True, torch.float32, False, torch.float32),
        (False, torch.bfloat16, True, torch.float32),
    ):
        head = SimpleNamespace(is_cuda=is_cuda, dtype=dtype)
        assert (gemm.needs_widening(head), gemm.gradient_dtype(head)) == (widened, gradient)


@pytest.mark.parametrize("workspace_mib", [600, 0.7], ids=["one chunk", "many"])
def test_nothing_is_formed_that_nobody_wants(workspace_mib, monkeypatch):
    inputs = cases.mixture(torch.float32, shared=True, n=N)
    student, weight = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_()
    bias, wanted, run = torch.zeros(cases.V), [], autograd.sweep
    monkeypatch.setattr(autograd, "sweep", lambda ops, w, grads: wanted.append(grads) or run(ops, w, grads))
    call = lambda s, w: fused_token_kl(s, Head(w, bias), inputs.teacher_hidden, workspace_mib=workspace_mib)  # noqa: E731
    expected = call(student, weight)
    with torch.no_grad():
        assert torch.equal(call(student, weight), expected)
    alone = [call(student.detach(), weight), call(student, weight.detach())]
    assert [[x is not None for x in (g.hidden, g.weight, g.bias)] for g in wanted] == [
        [True, True, False],
        [False, False, False],
        [False, True, False],
        [True, False, False],
    ]
    assert all(torch.equal(value, expected) for value in alone)
    for value, leaf in zip(alone, (weight, student), strict=True):
        (grad,) = torch.autograd.grad(value.sum(), leaf)
        torch.testing.assert_close(grad, torch.autograd.grad(expected.sum(), leaf, retain_graph=True)[0])
