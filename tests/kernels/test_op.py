"""fused_token_kl as autograd sees it: upstream gradients, chunks, memory."""

import importlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsd_kernels import Divergence, Head, TopK, autograd, fused_token_kl
from tests.kernels import cases

every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_kind = pytest.mark.parametrize("kind", cases.DIVERGENCES)
frozen_or_not = pytest.mark.parametrize("trainable", [True, False], ids=["trainable", "frozen"])


def gradients(backend, inputs, reduce, trainable=True, **options):
    student = inputs.student_hidden.clone().requires_grad_()
    head = inputs.head.clone().requires_grad_(trainable)
    value = fused_token_kl(student, head, inputs.teacher_hidden, inputs.teacher_head, backend=backend, **options)
    reduce(value).backward()
    return value.detach(), student.grad, head.grad


def assert_close_norm(found, expected, tolerance):
    assert (found - expected).norm() <= tolerance * expected.norm()


@every_backend
@every_kind
@frozen_or_not
def test_arbitrary_upstream_equals_token_weights(backend, kind, trainable):
    inputs = cases.mixture(torch.float32, shared=True)
    w = inputs.upstream
    options = {"divergence": cases.DIVERGENCES[kind], "trainable": trainable}
    value, *given = gradients(backend, inputs, torch.sum, token_weights=w, **options)
    plain, *arriving = gradients(backend, inputs, lambda v: (w * v).sum(), **options)
    torch.testing.assert_close(value, plain * w)
    _, *both = gradients(backend, inputs, lambda v: (w.sqrt() * v).sum(), token_weights=w.sqrt(), **options)
    for a, b, c in zip(given, arriving, both, strict=True):
        if a is not None:
            assert_close_norm(b, a, 1e-6)
            assert_close_norm(c, a, 1e-6)


@every_backend
def test_uniform_upstream_needs_one_sweep_and_another_one_two(backend, monkeypatch):
    page = importlib.import_module("opsd_kernels.autograd")
    sweeps, sweep = [], page.sweep
    monkeypatch.setattr(page, "sweep", lambda *a: sweeps.append(a) or sweep(*a))
    inputs = cases.mixture(torch.float32, shared=True)
    for reduce, expected in [(torch.sum, 1), (torch.mean, 1), (lambda v: (v * inputs.upstream).sum(), 2)]:
        sweeps.clear()
        gradients(backend, inputs, reduce)
        assert len(sweeps) == expected
        sweeps.clear()
        gradients(backend, inputs, reduce, trainable=False)
        assert len(sweeps) == 1


@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
def test_what_is_uniform_is_seen_without_waiting_for_a_device(monkeypatch):
    one, same, unlike = torch.ones(()).expand(3), torch.ones(3), torch.tensor([1.0, 2.0, 1.0])
    assert [autograd.is_uniform(x) for x in (one, same, unlike, unlike[:1])] == [True, True, False, True]
    monkeypatch.setattr(autograd, "on_host", lambda x: False)
    assert [autograd.is_uniform(x) for x in (one, same, unlike, unlike[:1])] == [True, False, False, True]
    assert not autograd.changes_nothing(one)


@every_backend
def test_second_backward_through_a_retained_graph(backend):
    inputs = cases.mixture(torch.float32, shared=False)
    student, head = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_()
    value = fused_token_kl(student, head, inputs.teacher_hidden, inputs.teacher_head, backend=backend).mean()
    first = [grad.clone() for grad in torch.autograd.grad(value, (student, head), retain_graph=True)]
    second = torch.autograd.grad(value, (student, head))
    for a, b in zip(first, second, strict=True):
        assert_close_norm(b, a, 1e-6)


@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
@pytest.mark.parametrize("name", ["student", "weight", "teacher", "teacher_weight", "teacher_bias", "token_weights"])
@pytest.mark.parametrize("uniform", [True, False], ids=["one sweep", "two"])
def test_what_a_second_sweep_reads_must_not_change(name, uniform):
    """A teacher that moves between forward and backward, say: refused, where its gradients would be wrong ones."""
    inputs = cases.mixture(torch.float32, shared=False, n=5)
    given = {"student": inputs.student_hidden.clone(), "weight": inputs.head.clone(), "teacher": inputs.teacher_hidden}
    given |= {"teacher_weight": inputs.teacher_head.clone(), "teacher_bias": torch.zeros(cases.V)}
    given |= {"token_weights": torch.rand(5)}
    leaves = [given[name].requires_grad_() for name in ("student", "weight")]
    sides = (*leaves, given["teacher"], Head(given["teacher_weight"], given["teacher_bias"]))
    value = fused_token_kl(*sides, token_weights=given["token_weights"])
    expected = torch.autograd.grad(value.sum(), leaves, retain_graph=True)
    value = fused_token_kl(*sides, token_weights=given["token_weights"])
    with torch.no_grad():
        given[name].add_(0.5)
    if uniform:
        assert all(torch.equal(a, b) for a, b in zip(torch.autograd.grad(value.sum(), leaves), expected, strict=True))
    else:
        with pytest.raises(RuntimeError, match=r"in ?place"):
            (value * inputs.upstream).sum().backward()


@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
@pytest.mark.parametrize("weighted", [True, False])
def test_the_value_may_be_changed_in_place(weighted):
    inputs = cases.mixture(torch.float32, shared=True)
    student = inputs.student_hidden.requires_grad_()
    weights = inputs.upstream if weighted else None
    value, stats = fused_token_kl(
        *(student, inputs.head, inputs.teacher_hidden),
        token_weights=weights,
        tokens=torch.arange(cases.N),
        return_stats=True,
    )
    (expected,) = torch.autograd.grad(value.sum(), student, retain_graph=True)
    before = [None if x is None else x.clone() for x in stats]
    value.mul_(2)
    torch.testing.assert_close(torch.autograd.grad(value.sum(), student)[0], 2 * expected)
    assert all(x is y is None or torch.equal(x, y) for x, y in zip(stats, before, strict=True))


@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
@pytest.mark.parametrize("uniform", [True, False], ids=["one sweep", "two"])
def test_a_teacher_and_weights_of_inference_mode(uniform):
    inputs = cases.mixture(torch.float32, shared=False, n=5)
    leaves = [inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_()]
    upstream = torch.ones(5) if uniform else torch.rand(5)
    weights, bias = torch.rand(5), torch.rand(cases.V)

    found = []
    for inference in (False, True):
        with torch.inference_mode(inference):
            hidden, teacher = inputs.teacher_hidden.clone(), Head(inputs.teacher_head.clone(), bias.clone())
            given = weights.clone()
        value = fused_token_kl(*leaves, hidden, teacher, token_weights=given)
        found.append(torch.autograd.grad(value, leaves, upstream))
    assert all(map(torch.equal, *found))


@every_backend
def test_double_backward_raises(backend):
    inputs = cases.mixture(torch.float32, shared=True)
    student = inputs.student_hidden.requires_grad_()
    value = fused_token_kl(student, inputs.head, inputs.teacher_hidden, backend=backend)
    (grad,) = torch.autograd.grad((value * value.detach().requires_grad_()).sum(), student, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_backend
@pytest.mark.parametrize("shared", [True, False], ids=["shared", "separate"])
def test_teacher_receives_no_gradient(backend, shared):
    inputs = cases.mixture(torch.float32, shared)
    teacher = inputs.teacher_hidden.requires_grad_()
    teacher_head = None if shared else inputs.teacher_head.requires_grad_()
    student = inputs.student_hidden.requires_grad_()
    fused_token_kl(student, inputs.head, teacher, teacher_head, backend=backend).sum().backward()
    assert teacher.grad is None
    assert shared or teacher_head.grad is None
    value = fused_token_kl(student.detach(), inputs.head, teacher, teacher_head, backend=backend)
    assert not value.requires_grad


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("teacher_head", ["none", "same", "detached", "equal copy"])
def test_identical_teacher_gives_exactly_zero(backend, kind, dtype, teacher_head):
    inputs = cases.mixture(dtype, shared=True)
    student, head = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_()
    other = {"none": None, "same": head, "detached": head.detach(), "equal copy": head.detach().clone()}
    value = fused_token_kl(
        *(student, head, student, other[teacher_head]), divergence=Divergence(kind, temperature=1.7), backend=backend
    )  # fmt: skip
    value.sum().backward()
    assert not value.any()
    assert not student.grad.any()
    assert not head.grad.any()


@every_backend
@every_kind
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_chunks_do_not_matter_and_runs_repeat_to_the_bit(backend, kind, dtype):
    if dtype == torch.bfloat16 and cases.INTERPRETED:
        pytest.skip("the row kernels see fp32 logits either way")
    inputs = cases.mixture(dtype, shared=False, n=21 if not cases.INTERPRETED else 3)
    options = {"divergence": cases.DIVERGENCES[kind], "token_weights": inputs.upstream}
    whole = gradients(backend, inputs, torch.sum, **options)
    again = gradients(backend, inputs, torch.sum, **options)
    assert all(torch.equal(a, b) for a, b in zip(whole, again, strict=True))
    n = inputs.student_hidden.shape[0]
    for rows_per_chunk in (1, n - 1, n + 1):
        value, *chunked = gradients(
            backend, inputs, torch.sum, workspace_mib=cases.workspace_for(inputs, backend, rows_per_chunk), **options
        )
        torch.testing.assert_close(value, whole[0], rtol=4e-6, atol=1e-6)
        for a, b in zip(chunked, whole[1:], strict=True):
            assert_close_norm(a.double(), b.double(), 2e-3)


@every_backend
@pytest.mark.parametrize("upstream", [True, False], ids=["upstream", "token_weights"])
def test_a_token_of_weight_0_may_hold_anything(backend, upstream):
    inputs = cases.mixture(torch.float32, shared=True, n=3)
    bias = torch.zeros(cases.V)
    teacher_bias = bias.index_fill(0, (inputs.student_hidden[:1] @ inputs.head.mT).argmax(dim=1), -torch.inf)
    student = inputs.student_hidden.requires_grad_()
    weights = torch.tensor([0.0, 1.0, 0.0])
    sides = (student, Head(inputs.head, bias), inputs.teacher_hidden, Head(inputs.head, teacher_bias))
    value = fused_token_kl(*sides, divergence="jsd", backend=backend)
    assert value.isfinite().all()
    value = fused_token_kl(*sides, backend=backend, token_weights=None if upstream else weights)
    assert (value == torch.inf).any() if upstream else value.isfinite()[0]
    torch.where(weights > 0, value, 0).sum().backward() if upstream else value[0].backward()
    assert not student.grad[[0, 2]].any()


@every_backend
@frozen_or_not
@pytest.mark.parametrize("n", [0, 1])
def test_few_tokens(backend, trainable, n):
    inputs = cases.mixture(torch.float32, shared=True, n=n)
    value, student_grad, head_grad = gradients(backend, inputs, torch.sum, trainable)
    assert value.shape == (n,)
    assert value.dtype == torch.float32
    assert student_grad.shape == inputs.student_hidden.shape
    if trainable:
        assert head_grad.shape == inputs.head.shape
        assert bool(head_grad.any()) == (n > 0)
    if n == 0:  # and with an upstream that is not expanded
        gradients(backend, inputs, lambda v: (v * inputs.upstream).sum(), trainable)


class PeakBytes(TorchDispatchMode):
    """Bytes of live storages made under it, and their peak."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.largest = {}, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                self.live[storage.data_ptr()] = (storage._weak_ref(), storage.nbytes())
                self.largest = max(self.largest, storage.nbytes())
        self.live = {
            key: (ref, size) for key, (ref, size) in self.live.items() if not torch.UntypedStorage._expired(ref)
        }
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return result


@pytest.mark.skipif(cases.INTERPRETED, reason="the workspace is the same")
@pytest.mark.parametrize("backend", ["native", "torch"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(("wanted", "softcap"), [("trainable", None), ("frozen", None), ("no_grad", 5.0)], ids=str)
def test_memory_stays_in_the_workspace(backend, dtype, wanted, softcap):
    n, vocab, width, mib = 3000, 2003, 32, 4 if backend == "native" else 24  # 24 MB of logits
    inputs = cases.mixture(dtype, shared=False, n=n, vocab=vocab, width=width)
    student, weight = inputs.student_hidden.requires_grad_(), inputs.head.requires_grad_(wanted == "trainable")
    sides = (student, Head(weight, softcap=softcap), inputs.teacher_hidden, inputs.teacher_head)
    with PeakBytes() as memory, torch.set_grad_enabled(wanted != "no_grad"):
        value = fused_token_kl(*sides, backend=backend, workspace_mib=mib)
        if value.requires_grad:
            value.sum().backward()
    results = n * width * 8 + n * 4 * 8 + (vocab * width * 8 if wanted == "trainable" else 0)
    assert memory.largest < n * vocab * 4, "a tensor of [tokens, vocabulary] was made"
    assert memory.peak <= mib * 2**20 + results


class Reads(TorchDispatchMode):
    """Refuses what makes the host wait for a device: values of tensors, and shapes that depend on them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "is_nonzero", "nonzero", "equal", "masked_select", "unique"), name
        return func(*args, **(kwargs or {}))


@every_kind
@frozen_or_not
@pytest.mark.skipif(cases.INTERPRETED, reason="the torch rows stand for every row kernel's host side")
def test_no_value_is_read_on_the_host(kind, trainable, monkeypatch):
    monkeypatch.setattr(autograd, "on_host", lambda x: False)
    inputs = cases.mixture(torch.bfloat16, shared=False, n=5)
    options = {"token_weights": inputs.upstream, "divergence": cases.DIVERGENCES[kind], "trainable": trainable}
    with Reads():
        gradients("torch", inputs, torch.sum, **options)


@every_backend
@pytest.mark.parametrize("support", [None, TopK(9)], ids=["whole", "top-k"])
@pytest.mark.parametrize("uniform", [True, False], ids=["one sweep", "two"])
def test_under_autocast(backend, support, uniform):
    inputs = cases.mixture(torch.float32, shared=True)
    reduce = torch.sum if uniform else lambda v: (v * inputs.upstream).sum()
    plain = gradients(backend, inputs, reduce, divergence=Divergence(support=support))
    with torch.autocast("cpu", torch.bfloat16):
        cast = gradients(backend, inputs, reduce, divergence=Divergence(support=support))
    assert all(torch.equal(a, b) for a, b in zip(plain, cast, strict=True))


@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
@pytest.mark.parametrize("backend", ["native"])  # the factor magnifies what the torch rows round, 5e-9
def test_limits_of_jsd(backend):
    inputs = cases.mixture(torch.float32, shared=True)
    operands = (inputs.student_hidden[:30], inputs.head, inputs.teacher_hidden[:30])  # divergences below 0.1
    for beta, kind, factor in [(1e-4, "forward_kl", 1e4), (1 - 1e-4, "reverse_kl", 1e4)]:
        jsd = fused_token_kl(*operands, divergence=Divergence("jsd", beta=beta), backend=backend)
        torch.testing.assert_close(jsd * factor, fused_token_kl(*operands, divergence=kind), rtol=1e-2, atol=1e-6)


@pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the backend")
def test_a_uniform_upstream_scales_the_gradients():
    """Also the 1 that the head's gradient is not multiplied by."""
    inputs = cases.mixture(torch.float32, shared=True)
    _, *plain = gradients("torch", inputs, torch.sum)
    for factor in (0.5, -1.0):
        _, *scaled = gradients("torch", inputs, lambda v, factor=factor: factor * v.sum())
        for a, b in zip(plain, scaled, strict=True):
            torch.testing.assert_close(a * factor, b)
