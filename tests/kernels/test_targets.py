"""Accuracy of fused_token_kl in numbers: on a self-distillation mixture with divergences from 1e-4 to 1.

bf16 is held against its own floor: the exact gradient of the logits rounded once to bf16, multiplied exactly, and the
product rounded. What does not depend on the mixture, such as runs that repeat to the bit, is in test_op.py.
"""

import functools

import pytest
import torch

from opsd_kernels import Divergence
from opsd_kernels.reference import token_divergence
from tests.kernels import cases
from tests.kernels.test_op import workspace_for
from tests.kernels.test_rows import run

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="too large for the interpreter")
every_backend = pytest.mark.parametrize("backend", ["native", "torch"])
every_kind = pytest.mark.parametrize("kind", cases.DIVERGENCES)
one_head_or_two = pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
N, V, D = 96, 4003, 64


@functools.cache
def mixture(dtype, shared):
    """Students and teachers at distances that give divergences from 1e-4 to about 1, heavy-tailed logits."""
    g = torch.Generator().manual_seed(11)
    head = torch.randn(V, D, generator=g) * torch.rand(V, 1, generator=g).pow(2) * 1.2
    student = torch.randn(N, D, generator=g)
    teacher = student + torch.logspace(-2.1, -0.55, N)[:, None] * torch.randn(N, D, generator=g)
    teacher_head = None if shared else (head * (1 + 1e-3 * torch.randn(V, D, generator=g))).to(dtype)
    upstream = torch.rand(N, generator=g) + 0.5
    return cases.Inputs(student.to(dtype), head.to(dtype), teacher.to(dtype), teacher_head, upstream)


def logits(inputs):
    teacher_head = inputs.head if inputs.teacher_head is None else inputs.teacher_head
    return inputs.student_hidden @ inputs.head.mT, inputs.teacher_hidden @ teacher_head.mT


def gradient_floor(inputs, divergence):
    """Of hidden states and head in bf16: nothing but roundings that nobody can avoid."""
    wide = inputs.double()
    z_s, z_t = logits(wide)
    (token_divergence(z_s.requires_grad_(), z_t, divergence) * wide.upstream).sum().backward()
    rounded = z_s.grad.bfloat16().double()
    return {"hidden": (rounded @ wide.head).bfloat16(), "head": (rounded.mT @ wide.student_hidden).bfloat16()}


@functools.cache
def truth(kind, dtype, shared):
    found = cases.differentiate(cases.dense(cases.DIVERGENCES[kind]), mixture(dtype, shared).double())
    low, high = found["value"].quantile(torch.tensor([0.1, 0.99], dtype=torch.float64))
    assert low < 1e-3
    assert high > 0.1
    return found


@every_backend
@every_kind
@one_head_or_two
def test_bf16_gradients_are_at_the_floor_of_bf16(backend, kind, shared):
    inputs, divergence = mixture(torch.bfloat16, shared), cases.DIVERGENCES[kind]
    expected, floor = truth(kind, torch.bfloat16, shared), gradient_floor(inputs, divergence)
    found = cases.differentiate(cases.fused(divergence, backend), inputs)
    assert (found["value"] >= 0).all()
    for name, least in floor.items():
        ours, theirs = cases.errors(found[name], expected[name]), cases.errors(least, expected[name])
        for measure in ("global", "median row") if name == "hidden" else ("global",):
            allowed = 1.25 * theirs[measure] + 2e-4
            assert ours[measure] <= allowed, f"{name}, {measure}: {ours[measure]:.2e}, allowed {allowed:.2e}"


@every_backend
@every_kind
@one_head_or_two
def test_fp32_is_no_worse_than_eager(backend, kind, shared):
    inputs, divergence = mixture(torch.float32, shared), cases.DIVERGENCES[kind]
    expected = truth(kind, torch.float32, shared)
    eager = cases.differentiate(cases.dense(divergence), inputs)
    found = cases.differentiate(cases.fused(divergence, backend), inputs)
    assert (found["value"] >= 0).all()
    for name, result in found.items():
        ours, theirs = cases.errors(result, expected[name]), cases.errors(eager[name], expected[name])
        for measure, error in ours.items():
            assert error <= 1.25 * theirs[measure], f"{name}, {measure}: {error:.2e}, eager {theirs[measure]:.2e}"


@every_backend
@every_kind
@pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "pair"])
def test_divergence_of_given_logits(backend, kind, is_delta):
    z_s, z_t = logits(mixture(torch.float32, shared=True))
    second = z_s - z_t if is_delta else z_t
    exact = z_s.double() - second.double() if is_delta else z_t.double()
    divergence = Divergence(kind, beta=0.3)
    expected = token_divergence(z_s.double(), exact, divergence)
    out, _ = run(backend, z_s, second, is_delta, divergence)
    error = (out["value"].double() - expected).abs()
    assert error[expected <= 1].max() <= 2e-7
    assert (error <= 4e-7 * expected.clamp(min=1)).all()  # above 1 the rounding of the centred logits shows


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_the_size_of_a_chunk(backend, kind, dtype):
    inputs, divergence = mixture(dtype, False), cases.DIVERGENCES[kind]
    whole = cases.differentiate(cases.fused(divergence, backend), inputs)
    budget = workspace_for(inputs, backend, 7)
    chunked = cases.differentiate(cases.fused(divergence, backend, workspace_mib=budget), inputs)
    assert (chunked["value"] - whole["value"]).abs().max() <= 1e-6
    for name in ("hidden", "head"):
        assert cases.errors(chunked[name], whole[name].double())["global"] <= 2e-3
