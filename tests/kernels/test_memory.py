"""Bytes that the op holds: at the size of a large model on CUDA, counted without one, and in a backward."""

import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from opsd_kernels import Divergence, Head, fused_token_kl, gemm, rows_triton
from opsd_kernels import sweep as kernel_sweep
from opsd_kernels.fused_token_kl import DEFAULT_WORKSPACE_MIB
from opsd_kernels.sweep import Gradients, Operands
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the row kernel")
V, D = 151936, 4096


class Held(TorchDispatchMode):
    """Most bytes of storages alive at once that were made since it was entered."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and (storage := tensor.untyped_storage())._cdata not in given:
                self.live[storage._cdata] = (storage._weak_ref(), storage.nbytes())
        self.live = {k: (ref, size) for k, (ref, size) in self.live.items() if not torch.UntypedStorage._expired(ref)}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


class NoRows:
    """Takes the scratch of the CUDA rows and computes nothing."""

    @staticmethod
    def scratch_bytes(vocab):
        return rows_triton.scratch_bytes(vocab)

    @classmethod
    def run(cls, z_s, *_):
        torch.empty(cls.scratch_bytes(z_s.shape[1]) // 4, device=z_s.device)


@pytest.fixture
def sweep_bytes(monkeypatch):
    """Peak of a sweep above operands and gradients; meta stands for CUDA, or for a CPU where half heads are widened."""
    monkeypatch.setattr(gemm, "logits_into", lambda *_: None)
    monkeypatch.setattr(gemm, "head_gradient_into", lambda *_, **__: None)
    monkeypatch.setattr(kernel_sweep, "_autocast_off", lambda ops: contextlib.nullcontext())  # unknown to meta
    meta = {"device": "meta", "dtype": torch.bfloat16}

    def measured(n, shared, trained, mib=DEFAULT_WORKSPACE_MIB, softcap=None, widened=False, with_grad=True):
        monkeypatch.setattr(gemm, "needs_widening", lambda head: widened)
        monkeypatch.setattr(gemm, "gradient_dtype", lambda head: torch.float32 if widened else head.dtype)
        monkeypatch.setattr(gemm, "hidden_gradient", lambda grad, *_: grad.new_empty(len(grad), D))
        student, weight = torch.empty(n, D, **meta), torch.empty(V, D, **meta)
        head = Head(weight, softcap=softcap)
        other = head if shared else Head(torch.empty(V, 2 * D, **meta)[:, :D])
        sides = (student, head, torch.empty(n, D, **meta), other)
        ops = Operands(*sides, Divergence("jsd"), NoRows, mib)
        hidden = torch.empty(n, D, **meta) if with_grad else None
        grads = Gradients(hidden, torch.empty(V, D, device="meta") if trained else None)
        with Held() as held:
            kernel_sweep.sweep(ops, None, grads)
        return held.peak

    return measured


@pytest.mark.parametrize(
    ("shared", "trained", "gib"), [(True, True, 1.2), (False, True, 1.2), (False, False, 0.75), (True, False, 0.45)]
)
def test_workspace_on_cuda(sweep_bytes, shared, trained, gib):
    for n in (8192, 131072):
        results = 40 * n  # nine numbers for each token, and the factor of its gradient
        assert sweep_bytes(n, shared, trained) <= gib * 2**30 + results


@pytest.mark.parametrize("softcap", [None, 30.0], ids=["linear", "softcap"])
@pytest.mark.parametrize("widened", [True, False], ids=["widened", "half"])
@pytest.mark.parametrize("wanted", ["head", "hidden", "nothing"])
def test_a_small_workspace_is_not_outgrown(sweep_bytes, softcap, widened, wanted):
    """Of fewer rows than chunks are rounded to, so that a part that is not counted shows."""
    kind = {"softcap": softcap, "widened": widened, "with_grad": wanted != "nothing"}
    for mib in (97, 140):
        for shared in (True, False):
            assert sweep_bytes(1000, shared, wanted == "head", mib, **kind) <= mib * 2**20 + 40 * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_backward_holds_the_hidden_gradient_once(dtype):
    n, width = 4096, 256
    student = torch.randn(n, width, dtype=dtype, requires_grad=True)
    head, teacher = torch.randn(32, width, dtype=dtype), torch.randn(n, width, dtype=dtype)
    value = fused_token_kl(student, head, teacher, backend="torch")
    with Held() as held:
        (found,) = torch.autograd.grad(value, student, torch.rand(n))
    assert held.peak < student.nbytes / 2
    assert found.shape == student.shape


def test_a_retained_graph_keeps_the_gradient():
    student, head, teacher = torch.randn(9, 8, requires_grad=True), torch.randn(32, 8), torch.randn(9, 8)
    value, upstream = fused_token_kl(student, head, teacher), torch.rand(9)
    (first,) = torch.autograd.grad(value, student, 2 * upstream, retain_graph=True)
    (second,) = torch.autograd.grad(value, student, upstream)
    torch.testing.assert_close(first, 2 * second)
    with pytest.raises(RuntimeError, match="expected retain_graph=True"):
        torch.autograd.grad(value, student, upstream)


class Widenings(TorchDispatchMode):
    """Copies of a half head into fp32."""

    def __init__(self, head):
        super().__init__()
        self.head, self.count = head, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.copy_.default and args[1].data_ptr() == self.head.data_ptr():
            self.count += args[0].dtype == torch.float32
        return func(*args, **(kwargs or {}))


def test_a_half_head_that_fits_is_widened_once():
    half = {"dtype": torch.bfloat16}
    student, teacher, head = torch.randn(1100, 32, **half), torch.randn(1100, 32, **half), torch.randn(64, 32, **half)
    with Widenings(head) as widenings:
        fused_token_kl(student.requires_grad_(), head, teacher, backend="torch").sum().backward()
    assert widenings.count == 1
