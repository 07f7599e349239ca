"""The CPU workspace that stays from call to call."""

import mmap
import os
import signal
import sys
import threading
import weakref

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from opsd_kernels import Divergence, Head, fused_token_kl, memory, sweep
from tests.kernels import cases

pytestmark = [
    pytest.mark.skipif(cases.INTERPRETED, reason="CPU memory"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="workspaces stay on Linux"),
]
N, V, D = 64, 5000, 16  # logits of 2.4 MiB


@pytest.fixture(autouse=True)
def nothing_kept():
    """Before and after."""
    memory.keep_workspace(False)
    memory.keep_workspace(True)
    yield
    memory.keep_workspace(False)
    memory.keep_workspace(True)


@pytest.fixture
def one_thread():
    """A child has none of its parent's others, and sums of one thread are not those of two to the bit."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@torch.enable_grad()  # also where autograd has it off: in a hook, in a forward
def results(dtype=torch.float32, trained=True, softcap=None, n=N, hook=None):
    """Value and gradients. hook: called with each of the gradients."""
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, n, D, generator=g).to(dtype).unbind()
    weight = torch.randn(V, D, generator=g).to(dtype).requires_grad_(trained)
    student.requires_grad_()
    for leaf in (student, weight) if hook else ():
        leaf.register_hook(hook)
    value = fused_token_kl(student, Head(weight, softcap=softcap), teacher, divergence=Divergence("jsd"))
    value.sum().backward()
    return [x for x in (value.detach(), student.grad, weight.grad) if x is not None]


def kept():
    return [block.data_ptr() for block in memory._kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trained", [True, False])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_what_a_call_left_behind_changes_nothing(dtype, trained, softcap):
    memory.keep_workspace(False)
    fresh = results(dtype, trained, softcap)
    memory.keep_workspace(True)
    results(dtype, trained, softcap)
    before = kept()
    assert before
    for block in memory._kept:
        block.fill_(0xFF)  # NaN
    again = results(dtype, trained, softcap)
    assert kept() == before
    for one, other in zip(again, fresh, strict=True):
        assert torch.equal(one, other)


def test_it_goes_where_none_is_to_stay():
    results()
    assert memory.keep_workspace(False)
    assert not kept()
    results()
    assert not kept()
    assert not memory.keep_workspace(True)


def test_a_larger_call_gets_a_larger_block_and_what_is_not_used_goes():
    small = results()
    (block,) = memory._kept
    results(n=2 * N)
    (larger,) = memory._kept
    assert larger.nbytes >= 2 * block.nbytes
    for one, other in zip(results(), small, strict=True):
        assert torch.equal(one, other)
    results(softcap=5.0)
    assert len(kept()) == 1  # the slopes take less than a page of their own
    with memory.workspace(torch.device("cpu")) as empty:
        empty(3)
    assert not kept()


def test_what_a_call_in_inference_mode_leaves_can_be_written_outside_of_it():
    with torch.inference_mode():
        results_of_inference = fused_token_kl(torch.randn(N, D), torch.randn(V, D), torch.randn(N, D))
    assert kept() and results_of_inference.isfinite().all()
    results()


def test_threads_do_not_share_it():
    wanted, found = results(), []
    threads = [threading.Thread(target=lambda: found.extend(results() for _ in range(5))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 20
    for one in found:
        for a, b in zip(one, wanted, strict=True):
            torch.testing.assert_close(a, b)


def test_a_sweep_inside_another_has_its_own(monkeypatch):
    """From a dispatch mode, say: the tensors of the outer one stay what they are."""
    kernel, inner = sweep.gemm.logits_into, []

    def nested(out, *operands):
        kernel(out, *operands)
        if not inner:
            inner.append(None)
            before = out.clone()
            inner.extend(results())
            assert torch.equal(out, before)

    wanted = results()
    monkeypatch.setattr(sweep.gemm, "logits_into", nested)
    for one, other, third in zip(results(), inner[1:], wanted, strict=True):
        assert torch.equal(one, third) and torch.equal(other, third)


def test_a_call_in_a_hook_of_the_backward_of_another():
    wanted, inner = results(), []
    assert all(torch.equal(a, b) for a, b in zip(results(hook=lambda _: inner.extend(results())), wanted, strict=True))
    assert len(inner) == 2 * len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(inner, wanted * 2, strict=True))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_forked_child_has_its_own(one_thread):
    wanted = results()
    before = kept()
    child = os.fork()
    if child == 0:  # no test of its own: it says what it found with its exit status
        try:
            signal.alarm(30)
            same = kept() == before and all(torch.equal(a, b) for a, b in zip(results(n=N), wanted, strict=True))
            memory._kept[0].fill_(0xFF)
            os._exit(0 if same else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert kept() == before
    assert not torch.equal(memory._kept[0], torch.full_like(memory._kept[0], 0xFF))
    assert all(torch.equal(a, b) for a, b in zip(results(), wanted, strict=True))


def test_advice_is_about_whole_pages_of_the_block_alone(monkeypatch):
    """What lies beside it on a page may be lost with MADV_FREE. The order: huge pages when made, free when done."""
    asked = []
    monkeypatch.setattr(memory, "_madvise", lambda: lambda *of: asked.append(of))
    with memory.workspace(torch.device("cpu")) as empty:
        x = empty(3, (1 << 20) + 1)
        assert [advice for *_, advice in asked] == [mmap.MADV_HUGEPAGE]
    assert [advice for *_, advice in asked] == [mmap.MADV_HUGEPAGE, mmap.MADV_FREE]
    for (start, size, _), page in zip(asked, (memory.HUGE_PAGE, mmap.PAGESIZE), strict=True):
        assert x.data_ptr() <= start < x.data_ptr() + page
        assert start % page == size % page == 0
        assert x.data_ptr() + x.nbytes - page < start + size <= x.data_ptr() + x.nbytes


def test_none_is_to_stay_said_while_one_is_in_use():
    with memory.workspace(torch.device("cpu")) as empty:
        empty(1 << 20)
        memory.keep_workspace(False)
    assert not kept()


def test_an_error_in_the_middle_keeps_the_block():
    made = []

    def fail():
        with memory.workspace(torch.device("cpu")) as empty:
            made.append(empty(3, 1 << 20))
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    (x,) = made
    assert x.shape == (3, 1 << 20) and x.dtype == torch.float32 and x.is_contiguous()
    assert kept() == [x.data_ptr()]


def test_the_block_of_a_smaller_call_is_not_held_beside_a_larger_one():
    with memory.workspace(torch.device("cpu")) as empty:
        empty(1 << 20)
    smaller = weakref.ref(memory._kept[0])
    with memory.workspace(torch.device("cpu")) as empty:
        empty(1 << 21)
        assert smaller() is None


def test_the_default_device_of_the_program_is_not_asked():
    wanted = results()
    memory.keep_workspace(False)
    memory.keep_workspace(True)
    g = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, N, D, generator=g).unbind()
    weight = torch.randn(V, D, generator=g)
    with torch.device("meta"):
        value = fused_token_kl(student, weight, teacher, divergence="jsd")
    assert torch.equal(value, wanted[0])


def test_fake_tensors_are_not_kept():
    with FakeTensorMode():
        value = fused_token_kl(torch.randn(N, D), torch.randn(V, D), torch.randn(N, D), backend="torch")
    assert value.shape == (N,)
    assert not kept()
    results()
    with FakeTensorMode():  # nor given a real one
        fused_token_kl(torch.randn(N, D), torch.randn(V, D), torch.randn(N, D), backend="torch")
    results()
