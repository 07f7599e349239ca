"""Packed attention against its definition: one softmax in fp64 under an explicit mask; every kernel, every gradient."""

from __future__ import annotations

import logging
import sys
import types

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from opsd import attention, attention_choice, attention_kernels, attention_plan
from opsd.attention import PackedKV, packed_attention
from opsd.attention_choice import choose_kernel
from opsd.attention_kernels import CPU_FLASH, CUDA_FLASH, DENSE
from opsd.attention_plan import plan
from opsd.attention_rows import Joined, Rectangle
from opsd.errors import InputError
from opsd.packing import Packed, Tree
from opsd.prefix_entry import Stored

CPU = torch.device("cpu")
# Lengths around 48, where padding a rectangle stops being free, and small ones.
TREES = st.lists(
    st.builds(
        Tree,
        root=st.integers(1, 70),
        responses=st.lists(st.integers(0, 12) | st.integers(55, 80), max_size=8).map(tuple),
        stored=st.booleans(),
    ),
    min_size=1,
    max_size=4,
).map(lambda trees: Packed(tuple(trees)))
WINDOWS = st.none() | st.integers(1, 12) | st.integers(60, 400)


def tree(root, *responses, stored=False):
    return Tree(root, responses, stored)


# One token; nothing fed; all lengths equal; padded buckets of roots and of children; one stored root among fresh ones.
CASES = [
    Packed((tree(1),)),
    Packed((tree(1, 0, 1, 0),)),
    Packed((tree(1, 2), tree(1, 2, 2))),
    Packed((tree(7, *[5] * 8),)),
    Packed((tree(9, 4, 3, 5), tree(8, 5, 1, 2, 0), tree(40, 2, 9))),
    Packed((tree(60, 70, 61), tree(66, 65, 3))),
    Packed((tree(6, 4, 4, stored=True), tree(5, 3), tree(9, 3, 2, stored=True))),
]


def visible(packed: Packed, window: int | None) -> torch.Tensor:
    """(S, S + stored) bool, straight from the sentence: a child sees its root and itself causally."""
    stored = sum(t.root for t in packed.trees if t.stored)
    mask = torch.zeros(packed.length, packed.length + stored, dtype=torch.bool)

    def sees(rows, place, keys, first_place):  # spans, and the positions of their first tokens
        distance = place + torch.arange(rows[1])[:, None] - first_place - torch.arange(keys[1])
        seen = (distance >= 0) & (distance < (window if window is not None else 1 << 30))
        mask[rows[0] : rows[0] + rows[1], keys[0] : keys[0] + keys[1]] = seen

    for one, root, children in zip(packed.trees, packed.roots, packed.children, strict=True):
        if not one.stored:
            sees(root, 0, root, 0)
        for child in children:
            sees(child, one.root, root, 0)
            sees(child, one.root, child, one.root)
    return mask


def tensors(packed: Packed, heads=2, group=1, width=8, dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    keys = packed.length + sum(t.root for t in packed.trees if t.stored)
    q = torch.randn(1, heads * group, packed.length, width, dtype=dtype).requires_grad_()
    k, v = (torch.randn(1, heads, keys, width, dtype=dtype).requires_grad_() for _ in range(2))
    return q, k, v, torch.randn(1, packed.length, heads * group, width, dtype=dtype)


def definition(packed: Packed, window, q, k, v, scale):
    group = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(group, 1).mT * scale
    weights = scores.masked_fill(~visible(packed, window), -torch.inf).softmax(-1)
    return (weights @ v.repeat_interleave(group, 1)).transpose(1, 2)


def shared(packed: Packed, window, kernel, q, k, v, scale):
    """Stored roots lie in tensors of their own, and get no gradient."""
    parts = plan(packed, window, kernel.ragged, CPU)
    lengths = [packed.length, *(t.root for t in packed.trees if t.stored)]
    (keys, *older_keys), (values, *older_values) = (x[0].transpose(0, 1).split(lengths) for x in (k, v))
    older = list(zip(older_keys, older_values, strict=True))
    rows = q[0].transpose(0, 1)
    return attention._PackedAttention.apply(rows, keys, values, older, parts, kernel, scale)[None]


def errors(packed: Packed, window, kernel, group=1, heads=2):
    """Largest absolute error of the output and of the row's three gradients; inputs have unit scale."""
    q, k, v, grad = tensors(packed, heads, group)
    results = []
    for compute in (lambda *x: shared(packed, window, kernel, *x), lambda *x: definition(packed, window, *x)):
        out = compute(q, k, v, 0.3)
        gradients = torch.autograd.grad(out, (q, k, v), grad)
        results.append((out.detach(), *(x[:, :, : packed.length] for x in gradients)))
    return [(a - b).abs().max().item() if a.numel() else 0.0 for a, b in zip(*results, strict=True)]


class Varlen:
    """The interface of CUDA's varlen kernels in plain torch: offsets, ends aligned, a window counted from there."""

    name, ragged = "varlen", True

    def lse_dtype(self, dtype):
        return dtype

    def _each(self, q, k, part):
        limit = part.queries.offsets.tolist(), part.keys.offsets.tolist()
        assert limit[0][-1] == len(q) and limit[1][-1] == len(k)
        assert part.queries.width == max(b - a for a, b in zip(limit[0], limit[0][1:], strict=False))
        for a, b, c, d in zip(limit[0], limit[0][1:], limit[1], limit[1][1:], strict=False):
            distance = torch.arange(b - a)[:, None] + (d - c) - (b - a) - torch.arange(d - c)
            mask = distance >= 0 if part.causal else torch.ones_like(distance, dtype=torch.bool)
            yield slice(a, b), slice(c, d), mask if part.window is None else mask & (distance < part.window)

    def _scores(self, q, k, mask, scale):
        group = q.shape[1] // k.shape[1]
        scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(group, 1)) * scale
        return scores.masked_fill(~mask, -torch.inf)

    def forward(self, q, k, v, part, scale):
        out, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:2], torch.nan)
        group = q.shape[1] // k.shape[1]
        for rows, keys, mask in self._each(q, k, part):
            scores = self._scores(q[rows], k[keys], mask, scale)
            lse[rows] = scores.logsumexp(-1).T
            out[rows] = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v[keys].repeat_interleave(group, 1))
        return out, lse

    def backward(self, grad, q, k, v, out, lse, part, scale):
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        group = q.shape[1] // k.shape[1]
        for rows, keys, mask in self._each(q, k, part):
            p = torch.exp(self._scores(q[rows], k[keys], mask, scale) - lse[rows].T[..., None])
            dp = torch.einsum("qhd,khd->hqk", grad[rows], v[keys].repeat_interleave(group, 1))
            ds = p * (dp - (grad[rows] * out[rows]).sum(-1).T[..., None]) * scale
            dq[rows] = torch.einsum("hqk,khd->qhd", ds, k[keys].repeat_interleave(group, 1))
            wide_k, wide_v = (torch.einsum("hqk,qhd->khd", *x) for x in ((ds, q[rows]), (p, grad[rows])))
            dk[keys], dv[keys] = (x.unflatten(1, (-1, group)).sum(2) for x in (wide_k, wide_v))
        return dq, dk, dv


VARLEN = Varlen()
KERNELS = pytest.mark.parametrize("kernel", [CPU_FLASH, DENSE, VARLEN], ids=lambda kernel: kernel.name)


@KERNELS
@settings(max_examples=40, deadline=None)
@given(packed=TREES, window=WINDOWS, group=st.sampled_from([1, 2, 3]))
@example(packed=CASES[0], window=None, group=1)
@example(packed=CASES[1], window=3, group=2)
@example(packed=CASES[2], window=1, group=1)
@example(packed=CASES[3], window=None, group=1)
@example(packed=CASES[4], window=6, group=2)
@example(packed=CASES[5], window=None, group=1)
@example(packed=CASES[6], window=4, group=2)
@example(packed=CASES[6], window=None, group=1)
def test_output_and_gradients_are_those_of_one_masked_softmax(kernel, packed, window, group):
    if packed.length:
        assert max(errors(packed, window, kernel, group)) < 2e-12


def test_runs_of_queries_too_long_to_stack_are_the_same(monkeypatch):
    monkeypatch.setattr(attention_kernels, "_LONGEST_BLOCK_FROM", 8)
    assert max(max(errors(packed, 6, CPU_FLASH, group=3)) for packed in CASES if packed.length) < 2e-12


def padded_buckets(packed, kernel=DENSE):
    parts = plan(packed, None, kernel.ragged, CPU)
    return [p for p in parts if any(getattr(x, "padded", False) for x in (p.queries, p.keys))]


def test_the_cases_reach_padded_rectangles_of_both_kinds():
    kinds = {part.merged for packed in CASES for part in padded_buckets(packed)}
    assert kinds == {False, True}
    assert any(part.mask is not None for packed in CASES for part in padded_buckets(packed))


def worst(kernel):
    return max(max(errors(packed, window, kernel)) for packed in CASES for window in (None, 5) if packed.length)


@KERNELS
def test_a_forgotten_root_is_seen(kernel, monkeypatch):
    monkeypatch.setattr(attention, "merge", lambda out, lse, other, other_lse: (out, lse))
    assert worst(kernel) > 1e-2


@KERNELS
def test_a_sum_without_weights_is_seen(kernel, monkeypatch):
    merge = attention.merge
    monkeypatch.setattr(attention, "merge", lambda a, x, b, y: ((a + b) / 2, merge(a, x, b, y)[1]))
    assert worst(kernel) > 1e-2


@pytest.mark.parametrize("kernel", [CPU_FLASH, DENSE], ids=lambda kernel: kernel.name)
def test_an_unmasked_repeat_of_a_key_is_seen(kernel, monkeypatch):
    part = attention_plan.Part
    monkeypatch.setattr(attention_plan, "Part", lambda *a, **k: part(*a, **{**k, "mask": None}))
    assert worst(kernel) > 1e-3


@pytest.mark.parametrize("kernel", [CPU_FLASH, DENSE], ids=lambda kernel: kernel.name)
def test_a_repeat_of_a_query_that_gets_gradient_is_seen(kernel, monkeypatch):
    monkeypatch.setattr(Rectangle, "take_grad", Rectangle.take)
    assert worst(kernel) > 1e-3


@KERNELS
def test_a_backward_with_the_log_sum_exp_of_a_part_is_seen(kernel, monkeypatch):
    merge = attention.merge
    monkeypatch.setattr(attention, "merge", lambda a, x, b, y: (merge(a, x, b, y)[0], y))
    assert worst(kernel) > 1e-2


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 2.0), (torch.bfloat16, 2.0)])
def test_low_precision_is_as_good_as_sdpa(dtype, bound):
    """Against fp64: no worse than torch's own masked attention in this dtype, by a factor of two."""
    packed = Packed((tree(50, 20, 31, 7), tree(33, 12)))
    q, k, v, grad = tensors(packed, heads=2, group=2, width=16)
    truth = definition(packed, None, q, k, v, 0.25)
    truth = [truth.detach(), *torch.autograd.grad(truth, (q, k, v), grad)]
    low = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    ours = shared(packed, None, CPU_FLASH, *low, 0.25)
    mask = visible(packed, None)
    theirs = torch.nn.functional.scaled_dot_product_attention(*low, mask, scale=0.25, enable_gqa=True).transpose(1, 2)
    found = [[x.detach(), *torch.autograd.grad(x, low, grad.to(dtype))] for x in (ours, theirs)]
    for exact, mine, torchs in zip(truth, *found, strict=True):
        limit = bound * (torchs.double() - exact).norm() + 1e-7 * exact.norm()
        assert (mine.double() - exact).norm() < limit


def test_windows_wider_than_everything_share_the_plan_of_full_layers():
    packed = Packed((tree(5, 4, 3), tree(9, 2)))
    carried = PackedKV(packed)
    full = carried.plan(None, DENSE, CPU)
    assert carried.plan(10, DENSE, CPU) is full and carried.plan(9, DENSE, CPU) is not full
    assert carried.plan(None, VARLEN, CPU) is not full, "ragged plans are others"


def test_stored_roots_stand_behind_the_row_and_kept_keys_are_the_rows_own():
    packed = Packed((tree(6, 4, 4, stored=True), tree(5, 3)))
    q, k, v, _ = tensors(packed)
    layer = types.SimpleNamespace(layer_idx=3)
    own, stored = slice(0, packed.length), slice(packed.length, None)
    nothing = k.new_empty(0)
    older = Stored([nothing] * 3 + [k[0, :, stored]], [nothing] * 3 + [v[0, :, stored]], 6.0, nothing)
    carried = PackedKV(packed, [older], keep=True)
    out, _ = packed_attention(layer, q, k[:, :, own], v[:, :, own], None, scaling=0.3, packed=carried)
    torch.testing.assert_close(out, definition(packed, None, q, k, v, 0.3), rtol=0, atol=1e-12)
    assert torch.equal(carried.kept[3][0], k[0, :, own]) and torch.equal(carried.kept[3][1], v[0, :, own])


def test_tokens_that_lie_in_one_tensor_are_read_there():
    first, second = torch.randn(3, 1, 2), torch.randn(4, 1, 2)
    joined = Joined([first, second])
    assert joined.narrow(0, 1, 2).data_ptr() == first[1].data_ptr()
    assert joined.narrow(0, 3, 4).data_ptr() == second.data_ptr()
    assert torch.equal(joined.narrow(0, 2, 3), torch.cat([first, second])[2:5])


def test_without_a_packed_row_it_is_the_sdpa_of_transformers():
    q, k, v, _ = tensors(CASES[3], group=2)
    module = types.SimpleNamespace(num_key_value_groups=2, is_causal=True, training=False)
    out, _ = packed_attention(module, q, k, v, None, scaling=0.3)
    causal = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, causal, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2), rtol=0, atol=1e-12)


def test_autocast_brings_normed_queries_and_plain_values_to_one_dtype():
    """Qwen3's norms leave q and k in fp32 under autocast while v is bf16."""
    q, k, v, _ = tensors(CASES[4], dtype=torch.float32)
    layer = types.SimpleNamespace(layer_idx=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = packed_attention(layer, q, k, v.bfloat16(), None, packed=PackedKV(CASES[4]))
    assert out.dtype == torch.bfloat16


# --- what only a GPU can run: operator signatures, and a package that mimics flash_attn ---


@pytest.mark.parametrize("window", [None, 3])
def test_torchs_varlen_operators_take_what_cuda_flash_gives_them(window):
    """Operator schemas, shapes and dtypes, on meta tensors: these operators have no CPU implementation."""
    meta = torch.device("meta")
    for packed in CASES[1:]:
        q, k, v, grad = (x.to(meta, torch.bfloat16).detach() for x in tensors(packed, heads=2, group=2, width=64))
        q, k, v = (x.requires_grad_() for x in (q, k, v))
        parts = plan(packed, window, True, meta)
        rows, keys, values = (x[0].transpose(0, 1) for x in (q, k, v))
        out = attention._PackedAttention.apply(rows, keys, values, [], parts, CUDA_FLASH, 0.1)
        assert out.shape == rows.shape and out.dtype == torch.bfloat16
        grads = torch.autograd.grad(out, (q, k, v), grad[0])
        assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]
        for part in parts:
            found, lse = CUDA_FLASH.forward(
                part.queries.take(rows), part.keys.take(keys), part.keys.take(values), part, 0.1
            )
            assert lse.shape == found.shape[:2] and lse.dtype == torch.float32


@pytest.fixture
def flash_attn(monkeypatch):
    """A module with the private varlen functions of flash-attn 2.7 and 2.8, computed by the reference above."""

    def part_of(cu_q, cu_k, max_q, max_k, causal, left, right):
        assert cu_q.dtype == cu_k.dtype == torch.int32
        assert (left, right) == (-1, -1) or (left >= 0 and right == 0 and causal)
        queries, keys = (types.SimpleNamespace(offsets=o, width=w) for o, w in ((cu_q, max_q), (cu_k, max_k)))
        return types.SimpleNamespace(
            queries=queries, keys=keys, causal=causal, window=None if left < 0 else left + 1, merged=False
        )

    def forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p, softmax_scale, causal,
        window_size_left=-1, window_size_right=-1, softcap=0.0, alibi_slopes=None, return_softmax=False,
        block_table=None, leftpad_k=None, seqused_k=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and not return_softmax
        part = part_of(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right
        )
        out, lse = VARLEN.forward(q, k, v, part, softmax_scale)
        return out, lse.T.contiguous(), torch.empty(0), torch.empty(2, dtype=torch.int64)

    def backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
        dropout_p, softmax_scale, causal, window_size_left, window_size_right, softcap, alibi_slopes, deterministic,
        rng_state=None, zero_tensors=False,
    ):  # fmt: skip
        assert dropout_p == 0.0 and softcap == 0.0 and softmax_lse.is_contiguous()
        assert dq.is_contiguous() and dk.is_contiguous() and dv.is_contiguous()
        part = part_of(
            cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, window_size_left, window_size_right
        )
        for into, found in zip((dq, dk, dv), VARLEN.backward(dout, q, k, v, out, softmax_lse.T, part, softmax_scale),
                               strict=True):  # fmt: skip
            into.copy_(found)
        return torch.empty(0)

    package, module = types.ModuleType("flash_attn"), types.ModuleType("flash_attn.flash_attn_interface")
    package.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
    module._flash_attn_varlen_forward, module._flash_attn_varlen_backward = forward, backward  # type: ignore
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setitem(sys.modules, "flash_attn.flash_attn_interface", module)
    monkeypatch.delitem(sys.modules, "opsd.attention_flash_attn", raising=False)
    attention_choice._choose.cache_clear()
    yield module
    sys.modules.pop("opsd.attention_flash_attn", None)
    attention_choice._choose.cache_clear()


def test_flash_attn_gives_the_definition_too(flash_attn, monkeypatch):
    from opsd.attention_flash_attn import FLASH_ATTN

    monkeypatch.setattr(type(FLASH_ATTN), "lse_dtype", lambda self, dtype: dtype)  # the mimic computes in fp64
    for packed in CASES:
        for window in (None, 4):
            assert max(errors(packed, window, FLASH_ATTN, group=2)) < 2e-12


@pytest.mark.parametrize("window", [None, 1, 4])
def test_torchs_varlen_kernel_and_flash_attn_are_told_the_same_window(flash_attn, window):
    """Both count the keys to the left of the diagonal; flash_attn's are checked against the definition above."""
    from opsd.attention_flash_attn import _window

    for part in plan(CASES[4], window, True, CPU):
        reach = attention_kernels._reach(part)
        assert (reach.get("window_size_left", -1), reach.get("window_size_right", -1)) == _window(part)


def query(device, dtype=torch.bfloat16, width=64):
    return types.SimpleNamespace(device=torch.device(device), dtype=dtype, shape=(1, 4, 10, width))


@pytest.fixture
def capability(monkeypatch):
    found = {"capability": (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: found["capability"])
    attention_choice._choose.cache_clear()
    yield found
    attention_choice._choose.cache_clear()


def test_the_kernel_follows_device_dtype_and_width(capability):
    assert choose_kernel(query("cpu", torch.float64)) is CPU_FLASH
    assert choose_kernel(query("cuda")) is CUDA_FLASH and choose_kernel(query("cuda", torch.float16)) is CUDA_FLASH
    for other in (query("cuda", torch.float32), query("cuda", width=36), query("cuda", width=512), query("mps")):
        assert choose_kernel(other) is DENSE
    capability["capability"] = (7, 5)
    assert choose_kernel(query("cuda", torch.float16)) is DENSE, "no flash kernel before Ampere"


def test_flash_attn_is_taken_when_installed_and_never_required(capability, flash_attn):
    from opsd.attention_flash_attn import FLASH_ATTN

    assert choose_kernel(query("cuda")) is FLASH_ATTN
    assert choose_kernel(query("cuda"), "flash") is CUDA_FLASH
    assert choose_kernel(query("cuda", torch.float32)) is DENSE and choose_kernel(query("cpu")) is CPU_FLASH


def test_a_choice_can_be_forced_and_says_where_it_does_not_work(capability):
    assert choose_kernel(query("cpu"), "dense") is DENSE and choose_kernel(query("cuda"), "dense") is DENSE
    for choice, where in (
        ("flash_attn", query("cpu")),
        ("flash", query("cuda", torch.float32)),
        ("flash", query("mps")),
    ):
        with pytest.raises(InputError, match=r"engine\.attention.*works for .* on"):
            choose_kernel(where, choice)
    with pytest.raises(InputError, match=r"flash-attn 2\.7 or later"):
        choose_kernel(query("cuda"), "flash_attn")


def test_the_choice_is_said_once(caplog, capability):
    with caplog.at_level(logging.INFO, logger="opsd.attention_choice"):
        for _ in range(3):
            choose_kernel(query("cpu", torch.float32, 32))
    assert [r.getMessage() for r in caplog.records] == [
        "attention of packed rows: cpu_flash, for float32 with heads of 32 on cpu"
    ]
