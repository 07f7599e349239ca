"""FusedLinearJSD against a dense JSD in fp64 with Liger's conventions, and against the real class where installed."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from opsd.integrations.liger import FusedLinearJSD

ROOT = Path(__file__).parents[2]
N, V, D, E = 21, 130, 16, 24


def operands(dtype=torch.float32):
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(N, D, generator=g), torch.randn(N, E, generator=g)
    head, teacher_head = torch.randn(V, D, generator=g) / 4, torch.randn(V, E, generator=g) / 4
    labels = torch.randint(V, (N,), generator=g)
    labels[::3] = -100
    tensors = [t.to(dtype) for t in (student, head, teacher, teacher_head)]
    return [tensors[0].requires_grad_(), tensors[1].requires_grad_(), *tensors[2:], labels]


def dense(student, head, teacher, teacher_head, labels, beta, temperature):
    """Liger's definition: mixture b * teacher + (1 - b) * student, the mean over tokens that are not ignored."""
    log_p = (student @ head.mT / temperature).log_softmax(-1)
    log_q = (teacher @ teacher_head.mT / temperature).log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    if beta == 0:
        value = (q * (log_q - log_p)).sum(-1)
    elif beta == 1:
        value = (p * (log_p - log_q)).sum(-1)
    else:
        log_m = (beta * q + (1 - beta) * p).log()
        value = (beta * q * (log_q - log_m) + (1 - beta) * p * (log_p - log_m)).sum(-1)
    return value.mean() if labels is None else value[labels != -100].mean()


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.2, 0.5, 1.0])
def test_value_and_gradients(beta, labelled):
    ours, truth = operands(), operands(torch.float64)
    if not labelled:
        ours[-1] = truth[-1] = None
    loss = FusedLinearJSD(beta, temperature=1.7)(*ours)
    wanted = dense(*truth, beta, 1.7)
    (3 * loss).backward()
    (3 * wanted).backward()
    torch.testing.assert_close(loss.double(), wanted, rtol=1e-6, atol=0)
    for found, true in zip(ours[:2], truth[:2], strict=True):
        torch.testing.assert_close(found.grad.double(), true.grad, rtol=1e-4, atol=1e-7)


def test_every_token_ignored_gives_zero():
    student, head, teacher, teacher_head, labels = operands()
    loss = FusedLinearJSD()(student, head, teacher, teacher_head, torch.full_like(labels, -100))
    loss.backward()
    assert loss == 0 and not student.grad.any() and not head.grad.any()


def test_bad_input():
    with pytest.raises(ValueError, match=r"expected beta in \[0, 1\], got 1.5"):
        FusedLinearJSD(1.5)
    with pytest.raises(ValueError, match="expected temperature as a number from 1e-06"):
        FusedLinearJSD(temperature=0)
    with pytest.raises(ValueError, match=r"expected shift_labels of shape \(21,\), got \(20,\)"):
        FusedLinearJSD()(*operands()[:4], operands()[4][1:])
    for found in (None, "0.5", [0.5], torch.tensor(0.5)):
        with pytest.raises(ValueError, match=r"expected beta in \[0, 1\], got"):
            FusedLinearJSD(found)
    names = ("student's hidden", "student's head", "teacher's hidden", "teacher's head", "shift_labels")
    for i, name in enumerate(names):
        for found in ([1.0], np.ones(3)):
            with pytest.raises(ValueError, match=f"expected .*{name}.* as a tensor, got {type(found).__name__}"):
                FusedLinearJSD()(*operands()[:i], found, *operands()[i + 1 :])


def real_class():
    pytest.importorskip("liger_kernel", reason="liger-kernel is not installed (the extra `peers`)")
    from liger_kernel.transformers import LigerFusedLinearJSD

    return LigerFusedLinearJSD


@pytest.mark.parametrize("method", ["__init__", "forward"])
def test_the_signature_is_that_of_the_library(method):
    theirs = inspect.signature(getattr(real_class(), method)).parameters
    ours = inspect.signature(getattr(FusedLinearJSD, method)).parameters
    assert list(ours) == list(theirs)
    for name, parameter in theirs.items():
        if parameter.default is not parameter.empty:
            assert ours[name].default == parameter.default


REAL = """
import torch
from liger_kernel.transformers import LigerFusedLinearJSD
from opsd.integrations.liger import FusedLinearJSD
from tests.integrations.test_liger import operands
for beta in (0.0, 0.3, 1.0):
    results = []
    for cls in (LigerFusedLinearJSD, FusedLinearJSD):
        inputs = operands()
        loss = cls(jsd_beta=beta, temperature=1.3)(*inputs)
        loss.backward()
        results.append((loss, inputs[0].grad, inputs[1].grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)
"""


def test_numbers_are_those_of_the_library():
    """Liger's kernel runs in Triton's interpreter, which is chosen when triton is imported: a process of its own."""
    real_class()
    env = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")
    done = subprocess.run([sys.executable, "-c", REAL], env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
