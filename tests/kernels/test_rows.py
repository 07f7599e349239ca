"""Row kernels on their own: logits in, values and gradients out. Degenerate rows, precision at tiny divergences."""

import importlib
from dataclasses import replace

import pytest
import torch

from opsd_kernels import Divergence
from opsd_kernels.reference import _terms, by_products, token_divergence
from opsd_kernels.rows import RESULTS, RowOutputs, select_rows
from tests.kernels import cases

every_backend = pytest.mark.parametrize("backend", cases.BACKENDS)
every_kind = pytest.mark.parametrize("kind", cases.DIVERGENCES)
both_forms = pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "pair"])
WIDTH = 600 if cases.INTERPRETED else 2500  # two blocks and a rest
ROWS = 1 if cases.INTERPRETED else 8


def run(backend, z_s, second, is_delta, divergence, scale=None, grad=None, tokens=None):
    """RowOutputs and gradient; every buffer the kernel should fill holds NaN before."""
    out = RowOutputs(torch.full((len(RESULTS), z_s.shape[0]), torch.nan))
    scale = torch.ones(z_s.shape[0]) if scale is None else scale
    z_s, second = z_s.clone(), second.clone()
    grad = z_s if grad is None else grad
    select_rows(backend, torch.device("cpu")).run(z_s, second, is_delta, divergence, scale, grad, out, tokens)
    return out, grad


def truth(z_s, second, is_delta, divergence):
    z_s, second = z_s.double().requires_grad_(), second.double()
    z_t = torch.where(z_s == -torch.inf, z_s, z_s - second).detach() if is_delta else second
    value = token_divergence(z_s, z_t, divergence)
    value.sum().backward()
    return value.detach(), z_s.grad, z_t


@every_backend
@every_kind
@both_forms
@pytest.mark.parametrize("distance", [1e-4, 5.0] if cases.INTERPRETED else [1e-4, 1e-2, 0.5, 5.0, 40.0])
def test_relative_precision(backend, kind, is_delta, distance):
    g = torch.Generator().manual_seed(1)
    z_s = 3 * torch.randn(ROWS, WIDTH, generator=g)
    second = distance * torch.randn(ROWS, WIDTH, generator=g)
    if not is_delta:
        second = z_s - second
    divergence = Divergence(kind, beta=0.3, temperature=0.8)
    expected, gradient, z_t = truth(z_s, second, is_delta, divergence)
    tokens = torch.randint(WIDTH, (ROWS,), generator=g)
    out, found = run(backend, z_s, second, is_delta, divergence, tokens=tokens)
    # centred logits of size x are exact to 2^-24 x, and so are their exponentials
    size = 1e-7 * (20 + 5 * distance)
    torch.testing.assert_close(out["value"].double(), expected, rtol=size, atol=2e-7)
    # saturated rows have gradients of almost nothing, left by terms of size 1
    allowed = (1e-5 + 1e-8 / distance) * gradient.norm(dim=1) + 2e-7 * min(1, distance)
    assert ((found.double() - gradient * 0.8).norm(dim=1) <= allowed).all()
    for name, truly in by_products(z_s.double(), z_t, divergence, tokens).items():
        torch.testing.assert_close(out[name].double(), truly, rtol=size, atol=size)


@every_backend
@every_kind
@both_forms
@pytest.mark.parametrize("distance", [0.5] if cases.INTERPRETED else [1e-3, 0.5, 5.0])
def test_clip(backend, kind, is_delta, distance):
    """Against fp64, with a limit that takes about a third of the mass from the first row."""
    g = torch.Generator().manual_seed(4)
    z_s = 3 * torch.randn(ROWS, WIDTH, generator=g)
    z_t = z_s - distance * torch.randn(ROWS, WIDTH, generator=g)
    second = z_s - z_t if is_delta else z_t
    free = Divergence(kind, beta=0.3, temperature=0.8)
    terms = _terms((z_s[0] / 0.8).double().log_softmax(-1), (z_t[0] / 0.8).double().log_softmax(-1), free)
    highest = terms.sort().values[-6:-4]
    divergence = replace(free, clip=highest.mean().item())
    expected, gradient, z_t = truth(z_s, second, is_delta, divergence)
    tokens = torch.zeros(ROWS, dtype=torch.int64)
    out, found = run(backend, z_s, second, is_delta, divergence)
    size = 1e-6 * min(1, distance)
    torch.testing.assert_close(out["value"].double(), expected, rtol=2e-6, atol=size)
    assert ((found.double() - gradient * 0.8).norm(dim=1) <= 2e-5 * gradient.norm(dim=1) + size).all()
    clipped = by_products(z_s.double(), z_t, divergence, tokens)["clip_fraction"]
    assert clipped[0] > 0.01
    torch.testing.assert_close(out["clip_fraction"].double(), clipped, rtol=1e-5, atol=1e-6)


@every_backend
@every_kind
@both_forms
def test_a_clip_that_nothing_reaches_changes_nothing(backend, kind, is_delta):
    z_s, second = 3 * torch.randn(3, WIDTH), 0.1 * torch.randn(3, WIDTH)
    second[2] = 0 if is_delta else z_s[2]
    second[:2] = second[:2] if is_delta else z_s[:2] - second[:2]
    plain, grad = run(backend, z_s, second, is_delta, Divergence(kind))
    out, same = run(backend, z_s, second, is_delta, Divergence(kind, clip=50.0))
    torch.testing.assert_close(out["value"], plain["value"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(same, grad, rtol=1e-4, atol=1e-8)
    assert not out["clip_fraction"].any()
    assert not out["value"][2]
    assert not same[2].any()


@every_backend
@both_forms
def test_sampled_token_of_a_sure_student(backend, is_delta):
    """A log-probability of almost 0 keeps its digits; the token may be the first, the last, none or wrong."""
    g = torch.Generator().manual_seed(3)
    z_s = torch.randn(5, WIDTH, generator=g)
    z_s[:, 0] += 19
    z_t = z_s + 0.1 * torch.randn(5, WIDTH, generator=g)
    second = z_s - z_t if is_delta else z_t
    tokens = torch.tensor([0, WIDTH - 1, 300, -100, WIDTH])
    out, _ = run(backend, z_s, second, is_delta, Divergence(), tokens=tokens)
    for side, logits in (("student", z_s), ("teacher", z_t)):
        found = out[f"{side}_logprob"]
        log_p = logits.double().log_softmax(-1)[range(3), tokens[:3]]
        torch.testing.assert_close(found[:3].double(), log_p, rtol=1e-6, atol=3e-7)
        assert found[3] == 0
        assert found[4].isnan()


@every_backend
@every_kind
@both_forms
def test_identical_rows_give_exactly_zero(backend, kind, is_delta):
    z_s = 5 * torch.randn(4, WIDTH)
    z_s[0, 5] = 200.0  # saturated
    z_s[1] = 0.0
    second = torch.zeros_like(z_s) if is_delta else z_s
    out, grad = run(backend, z_s, second, is_delta, Divergence(kind, temperature=1.7))
    assert not out["value"].any()
    assert not grad.any()


@every_backend
@every_kind
@both_forms
def test_padded_vocabulary(backend, kind, is_delta):
    """Columns that are -inf on both sides count nothing, wherever they are."""
    g = torch.Generator().manual_seed(2)
    z_s = 2 * torch.randn(ROWS, WIDTH, generator=g)
    second = 0.3 * torch.randn(ROWS, WIDTH, generator=g)
    dead = torch.rand(WIDTH, generator=g) < 0.3
    dead[:130] = True
    dead[-1] = True
    if not is_delta:
        second = z_s - second
        second[:, dead] = -torch.inf
    z_s[:, dead] = -torch.inf
    divergence = Divergence(kind)
    out, grad = run(backend, z_s, second, is_delta, divergence)
    kept, grad_kept = run(backend, z_s[:, ~dead], second[:, ~dead], is_delta, divergence)
    assert not grad[:, dead].any()
    torch.testing.assert_close(grad[:, ~dead], grad_kept, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(out["value"], kept["value"], rtol=5e-6, atol=1e-9)
    torch.testing.assert_close(out.table[1:], kept.table[1:])


@every_backend
@every_kind
@both_forms
@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clipped"])
def test_one_side_excludes_tokens(backend, kind, is_delta, clip):
    """-inf on one side only: KL(a||b) is +inf where a has mass and b has none; everything else is finite."""
    g = torch.Generator().manual_seed(5)
    z_s = 2 * torch.randn(4, WIDTH, generator=g)
    z_t = z_s + 0.3 * torch.randn(4, WIDTH, generator=g)
    z_t[0, z_s[0].argmax()] = -torch.inf
    z_t[1, z_s[1].topk(2).indices[1]] = -torch.inf
    if not is_delta:  # a difference of -inf says nothing about the teacher
        z_s[2, z_t[2].argmax()] = -torch.inf
    second = z_s - z_t if is_delta else z_t
    divergence = Divergence(kind, beta=0.3, clip=clip)
    out, grad = run(backend, z_s, second, is_delta, divergence)
    infinite = {"reverse_kl": [0, 1], "forward_kl": [] if is_delta else [2], "jsd": []}[kind]
    infinite = [] if clip else infinite
    finite = [row for row in range(4) if row not in infinite]
    assert (out["value"][infinite] == torch.inf).all()
    assert clip or not out["clip_fraction"].any()
    expected, gradient, _ = truth(z_s, second, is_delta, divergence)
    torch.testing.assert_close(out["value"][finite].double(), expected[finite], rtol=2e-5, atol=1e-6)
    torch.testing.assert_close(grad[finite].double(), gradient[finite], rtol=1e-4, atol=1e-6)
    assert out["top1_agreement"][0] == 0
    for name in ("student_entropy", "teacher_entropy", "student_lse", "teacher_lse"):
        assert out[name].isfinite().all()
    truly = by_products(z_s.double(), z_t.double(), divergence, torch.zeros(4, dtype=torch.int64))
    torch.testing.assert_close(out["teacher_lse"].double(), truly["teacher_lse"], rtol=1e-6, atol=1e-6)
    _, left_out = run(backend, z_s, second, is_delta, divergence, scale=torch.zeros(4))
    assert not left_out.any()


@every_backend
@every_kind
@both_forms
def test_one_hot_rows(backend, kind, is_delta):
    z_s = torch.full((3, WIDTH), -60.0)
    z_t = z_s.clone()
    z_s[:, 7] = 60.0
    z_t[0, 7] = 60.0  # the same token
    z_t[1, WIDTH - 1] = 60.0  # another one, far away
    z_t[2] = 0.0  # a teacher that does not know
    second = z_s - z_t if is_delta else z_t
    divergence = Divergence(kind, beta=0.5)
    expected, gradient, _ = truth(z_s, second, is_delta, divergence)
    out, grad = run(backend, z_s, second, is_delta, divergence)
    torch.testing.assert_close(out["value"].double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(grad.double(), gradient, rtol=1e-5, atol=2e-6)


@every_backend
@every_kind
def test_never_negative_and_bounded(backend, kind):
    """Rounding noise of the logits themselves is the smallest difference there is."""
    z_s = 8 * torch.randn(ROWS, WIDTH)
    z_t = z_s * (1 + 2.0**-23)
    out, _ = run(backend, z_s, z_t, False, Divergence(kind, beta=0.1))
    assert (out["value"] >= 0).all()
    assert out["value"].max() < 1e-9


@every_backend
@pytest.mark.parametrize("kind", ["reverse_kl", "forward_kl"])
def test_a_limit_that_no_term_reaches_costs_no_digits(backend, kind):
    """Of a small difference: a plain sum of terms of first order, as the rows in torch take here, has three."""
    g = torch.Generator().manual_seed(17)
    z_s, delta = 8 * torch.randn(ROWS, WIDTH, generator=g), 1e-3 * torch.randn(ROWS, WIDTH, generator=g)
    expected, gradient, _ = truth(z_s, delta, True, Divergence(kind))
    out, found = run(backend, z_s, delta, True, Divergence(kind, clip=50.0))
    rtol = 2e-3 if backend == "torch" else 1e-5
    torch.testing.assert_close(out["value"].double(), expected, rtol=rtol, atol=1e-14)  # of fp64
    assert ((found.double() - gradient).norm(dim=1) <= 1e-6 * gradient.norm(dim=1)).all()


@every_backend
@every_kind
def test_scale_multiplies_the_gradient_only(backend, kind):
    z_s, delta, scale = torch.randn(3, WIDTH), 0.1 * torch.randn(3, WIDTH), torch.tensor([2.0, 0.0, -0.5])
    plain, grad = run(backend, z_s, delta, True, Divergence(kind))
    out, scaled = run(backend, z_s, delta, True, Divergence(kind), scale)
    assert torch.equal(out["value"], plain["value"])
    torch.testing.assert_close(scaled, grad * scale[:, None], rtol=1e-6, atol=0)


@every_backend
@every_kind
def test_gradient_into_its_own_buffer(backend, kind):
    z_s, delta = torch.randn(3, WIDTH), 0.1 * torch.randn(3, WIDTH)
    _, in_place = run(backend, z_s, delta, True, Divergence(kind))
    _, apart = run(backend, z_s, delta, True, Divergence(kind), grad=torch.full((3, WIDTH), torch.nan))
    assert torch.equal(in_place, apart)


@every_backend
@every_kind
def test_nan_goes_through(backend, kind):
    z_s, delta = torch.randn(2, WIDTH), torch.zeros(2, WIDTH)
    z_s[0, WIDTH // 2] = torch.nan
    out, _ = run(backend, z_s, delta, True, Divergence(kind))
    assert out["value"].isnan().tolist() == [True, False]


@every_backend
@every_kind
def test_nan_where_the_student_has_no_mass_reaches_the_gradient(backend, kind):
    z_s = torch.randn(2, WIDTH)
    z_s[:, WIDTH // 2] = -200.0
    z_t = z_s + 0.1 * torch.randn(2, WIDTH)
    z_t[0, WIDTH // 2] = torch.nan
    out, grad = run(backend, z_s, z_t, False, Divergence(kind))
    assert out["value"].isnan().tolist() == [True, False]
    assert grad.isfinite().all(dim=1).tolist() == [False, True]


@pytest.fixture
def native():
    if cases.INTERPRETED:
        pytest.skip("native only")
    module = importlib.import_module("opsd_kernels.rows_native")
    if module.obstacle():
        pytest.skip(module.obstacle())
    return module


@pytest.mark.parametrize("name", [b"generic", b"avx2"])
@pytest.mark.parametrize("distance", [0.3, 1.0, 4.0])  # one exponential for both sides, some of each, and one for each
@pytest.mark.parametrize("clip", [None, 2e-3], ids=["free", "clipped"])
@every_kind
@both_forms
def test_every_instruction_set_agrees(native, name, distance, clip, kind, is_delta):
    g = torch.Generator().manual_seed(8)
    z_s, second = 3 * torch.randn(3, WIDTH, generator=g), distance * torch.randn(3, WIDTH, generator=g)
    if not is_delta:
        second = z_s - second
    operands = (z_s, second, is_delta, Divergence(kind, temperature=1.1, clip=clip))
    tokens = torch.tensor([0, WIDTH - 1, 300])
    best, best_grad = run("native", *operands, tokens=tokens)
    widest = native.instruction_set()
    try:
        native._library().opsd_rows_use_isa(name)
        chosen = native.instruction_set()
        out, grad = run("native", *operands, tokens=tokens)
    finally:
        native._library().opsd_rows_use_isa(None)
    assert chosen == name.decode() or widest in ("neon", "generic")  # which know no other one
    assert native.instruction_set() == widest
    torch.testing.assert_close(out.table, best.table, rtol=2e-6, atol=5e-7)
    torch.testing.assert_close(out["value"], best["value"], rtol=2e-6, atol=1e-9)
    torch.testing.assert_close(grad, best_grad, rtol=1e-4, atol=1e-8)


@every_kind
def test_threads_share_the_rows(native, kind):
    g = torch.Generator().manual_seed(9)
    z_s, z_t = 3 * torch.randn(2, 211, WIDTH, generator=g)
    operands = (z_s, z_t, False, Divergence(kind, clip=0.01), torch.rand(211, generator=g))
    tokens, threads, found = torch.randint(WIDTH, (211,), generator=g), torch.get_num_threads(), []
    try:
        for count in (1, 7):
            torch.set_num_threads(count)
            assert native.scratch_bytes(1000) == 4000 * count
            out, grad = run("native", *operands, tokens=tokens)
            found.append((out.table, grad))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
