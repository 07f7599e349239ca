"""A teacher head on another device. On a machine without one the path is forced: the same products, then a copy."""

import pytest
import torch

from opsd_kernels import Head, fused_token_kl, sweep
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="the row kernels see logits either way")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def operands(teacher_dtype, cap):
    """A student in fp32, a teacher of another width and dtype."""
    inputs = cases.mixture(torch.float32, shared=True)
    teacher = cases.mixture(teacher_dtype, shared=True, width=32)
    head = Head(inputs.head.requires_grad_(), softcap=cap)
    return inputs.student_hidden.requires_grad_(), head, teacher.student_hidden, Head(teacher.head, softcap=cap)


def results(student, head, teacher, teacher_head, **options):
    value = fused_token_kl(student, head, teacher, teacher_head, divergence="jsd", **options)
    weights = torch.linspace(0.5, 1.5, len(value), device=value.device)
    return [value.detach(), *torch.autograd.grad((value * weights).sum(), (student, head.weight))]


@pytest.mark.parametrize("teacher_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("cap", [None, 5.0], ids=["linear", "softcap"])
def test_logits_copied_from_elsewhere(teacher_dtype, cap, monkeypatch):
    sides = operands(teacher_dtype, cap)
    here = results(*sides)
    chunks, allocate = [], sweep._allocate
    monkeypatch.setattr(sweep.Operands, "is_remote", property(lambda ops: True))
    monkeypatch.setattr(sweep, "_allocate", lambda *a: chunks.append(allocate(*a)) or chunks[-1])
    elsewhere = results(*sides, workspace_mib=0.5)  # several chunks, the last one shorter
    assert all(work.z_remote is not None for work in chunks)
    assert (chunks[0].scratch_remote is None) == (teacher_dtype == torch.float32)
    for found, expected in zip(elsewhere, here, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_logits_are_not_copied_within_a_device(monkeypatch):
    made, allocate = [], sweep._allocate
    monkeypatch.setattr(sweep, "_allocate", lambda *a: made.append(allocate(*a)) or made[-1])
    results(*operands(torch.bfloat16, None))
    assert made[0].z_remote is made[0].scratch_remote is None


@needs_cuda
@pytest.mark.parametrize("hidden_there", [True, False], ids=["hidden states there", "hidden states here"])
def test_teacher_on_the_cpu(hidden_there):
    student, head, teacher, teacher_head = operands(torch.bfloat16, None)
    expected = results(student, head, teacher, teacher_head)
    moved = (student.detach().cuda().requires_grad_(), Head(head.weight.detach().cuda().requires_grad_()))
    found = results(*moved, teacher if hidden_there else teacher.cuda(), teacher_head)
    for a, b in zip(found, expected, strict=True):
        assert (a.cpu() - b).norm() <= 1e-4 * b.norm()


def test_teacher_hidden_states_on_a_third_device():
    student, head, teacher, teacher_head = operands(torch.float32, None)
    with pytest.raises(
        ValueError, match="expected teacher_hidden on the device of student_hidden or teacher_head, cpu, got meta"
    ):
        fused_token_kl(student, head, teacher.to("meta"), teacher_head)
