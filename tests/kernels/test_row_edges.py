"""Row kernels where something ends: equal maxima, the last column, rows far apart, the reach of a series."""

import pytest
import torch

from opsd_kernels import Divergence
from opsd_kernels.rows import RESULTS, RowOutputs, select_rows
from tests.kernels import cases
from tests.kernels.test_rows import WIDTH, both_forms, every_backend, every_kind, run, truth


@every_backend
@both_forms
def test_the_first_of_equal_maxima_is_the_choice(backend, is_delta):
    """Whichever vector, tile or program of the row holds the others, of which the teacher prefers another one."""
    g = torch.Generator().manual_seed(12)
    equal, rows = [3, 300, WIDTH - 2, 5], 3 if cases.INTERPRETED else 4
    z_s = torch.randn(rows, WIDTH, generator=g)
    z_s[:, equal] = 6.0
    z_t = z_s + 0.3 * torch.randn(rows, WIDTH, generator=g)
    z_t[range(rows), equal[:rows]] = 9.0
    second = z_s - z_t if is_delta else z_t
    divergence = Divergence("jsd", beta=0.3)
    expected, gradient, _ = truth(z_s, second, is_delta, divergence)
    out, found = run(backend, z_s, second, is_delta, divergence)
    assert out["top1_agreement"].tolist() == [1] + [0] * (rows - 1)
    torch.testing.assert_close(out["value"].double(), expected, rtol=2e-6, atol=0)
    assert ((found.double() - gradient).norm(dim=1) <= 2e-6 * gradient.norm(dim=1)).all()


@every_backend
@both_forms
def test_the_teacher_excludes_what_is_best_in_one_part(backend, is_delta):
    """Of another program, or of an earlier tile: where the row has its maximum, both sides agree."""
    g = torch.Generator().manual_seed(14)
    z_s = torch.randn(2, WIDTH, generator=g)
    z_t = z_s + 0.3 * torch.randn(2, WIDTH, generator=g)
    best, excluded = [3, 300], [WIDTH - 2, 3]
    z_s[range(2), best], z_s[range(2), excluded] = 6.0, 5.0
    z_t[range(2), best], z_t[range(2), excluded] = 7.0, -torch.inf
    second = z_s - z_t if is_delta else z_t
    divergence = Divergence("jsd", beta=0.3)
    expected, gradient, _ = truth(z_s, second, is_delta, divergence)
    out, found = run(backend, z_s, second, is_delta, divergence)
    assert out["top1_agreement"].all()
    torch.testing.assert_close(out["value"].double(), expected, rtol=2e-6, atol=0)
    assert ((found.double() - gradient).norm(dim=1) <= 2e-6 * gradient.norm(dim=1)).all()


@every_backend
@both_forms
def test_the_teacher_may_prefer_any_column(backend, is_delta):
    """Each place in a vector, and the last column."""
    columns = [7, 0, WIDTH - 1] if cases.INTERPRETED else [7, 0, *range(256, 272), WIDTH - 1]
    z_s = torch.zeros(len(columns), WIDTH)
    z_s[:, 7] = 2.0
    z_t = z_s.clone()
    z_t[range(len(columns)), columns] = 3.0
    out, _ = run(backend, z_s, z_s - z_t if is_delta else z_t, is_delta, Divergence())
    assert out["top1_agreement"].tolist() == [1] + [0] * (len(columns) - 1)
    lse = z_t.double().logsumexp(-1)
    torch.testing.assert_close(out["teacher_lse"].double(), lse, rtol=1e-6, atol=0)


@every_backend
@every_kind
def test_small_differences_keep_their_digits(backend, kind):
    """Divergences of 1e-9, with an offset of the logits beside; the rows in torch sum what is left of larger terms."""
    g = torch.Generator().manual_seed(15)
    z_s, delta = 2 * torch.randn(2, WIDTH, generator=g), 1e-4 * torch.randn(2, WIDTH, generator=g)
    delta[1] += 1e-4
    divergence = Divergence(kind, beta=0.3)
    expected, gradient, _ = truth(z_s, delta, True, divergence)
    out, found = run(backend, z_s, delta, True, divergence)
    rtol = 2e-3 if backend == "torch" else 1e-6
    torch.testing.assert_close(out["value"].double(), expected, rtol=rtol, atol=0)
    assert ((found.double() - gradient).norm(dim=1) <= 1e-6 * gradient.norm(dim=1)).all()


@every_backend
def test_what_a_clip_leaves_of_a_sure_teacher_keeps_its_digits(backend):
    """Forward KL: columns that are not clipped have a gradient of 1e-4 of what would cancel in it."""
    g = torch.Generator().manual_seed(16)
    z_s = torch.randn(2, WIDTH, generator=g)
    z_t = z_s + 0.3 * torch.randn(2, WIDTH, generator=g)
    z_s[:, -1], z_t[:, -1] = z_s.logsumexp(-1), z_t.logsumexp(-1) + 9.2  # about a half, and all but 1e-4
    divergence = Divergence("forward_kl", clip=0.2)
    expected, gradient, _ = truth(z_s, z_t, False, divergence)
    out, found = run(backend, z_s, z_t, False, divergence)
    torch.testing.assert_close(out["clip_fraction"], z_s.softmax(-1)[:, -1], rtol=1e-5, atol=0)
    torch.testing.assert_close(out["value"].double(), expected, rtol=2e-6, atol=0)
    for left in (slice(0, -1), slice(-1, None)):
        error = (found.double() - gradient)[:, left].norm(dim=1)
        assert (error <= 5e-6 * gradient[:, left].norm(dim=1)).all()


@every_backend
@every_kind
@pytest.mark.parametrize("clip", [None, 50.0], ids=["free", "limited"])
def test_the_reach_of_every_series(backend, kind, clip):
    """All columns where a polynomial ends, or just beyond: |d| and |r| are alike, as the normalisers are."""
    size = torch.tensor([0.24, 0.99] if cases.INTERPRETED else [0.24, 0.26, 0.99, 1.01, 1.95, 2.05])[:, None]
    g = torch.Generator().manual_seed(13)
    z_s = 1e-3 * torch.randn(len(size), WIDTH, generator=g)
    positive = torch.randperm(WIDTH, generator=g) < WIDTH * size.sigmoid()  # so many that the mean of exp(-d) is 1
    delta = torch.where(positive, size, -size)
    z_s[:, 0], delta[:, 0] = 1.0, 0.0  # the centre
    divergence = Divergence(kind, beta=0.4, clip=clip)
    expected, gradient, _ = truth(z_s, delta, True, divergence)
    out, found = run(backend, z_s, delta, True, divergence)
    torch.testing.assert_close(out["value"].double(), expected, rtol=1e-6, atol=0)
    assert ((found.double() - gradient).norm(dim=1) <= 1e-6 * gradient.norm(dim=1)).all()


@every_backend
def test_rows_of_wider_ones(backend):
    """Each tensor has a stride of its own; both logits of Triton share one."""
    g = torch.Generator().manual_seed(10)
    wider = (7, 7, 11) if backend == "triton" else (7, 3, 11)
    z_s, z_t, grad = (torch.randn(2, WIDTH + more, generator=g)[:, :WIDTH] for more in wider)
    divergence = Divergence("jsd")
    expected, slope = run(backend, z_s.contiguous(), z_t.contiguous(), False, divergence)
    out = RowOutputs(torch.full((len(RESULTS), 9), torch.nan)[:, :2])
    select_rows(backend, torch.device("cpu")).run(z_s, z_t, False, divergence, torch.ones(2), grad, out, None)
    assert torch.equal(out.table, expected.table) and torch.equal(grad, slope)


@every_backend
@pytest.mark.skipif(cases.INTERPRETED, reason="copies whole storages; test_triton.py reads the compiled code instead")
def test_rows_gigabytes_apart(backend, tmp_path):
    """Offsets beyond 2^31 elements, in a sparse file: what is not touched takes no memory."""
    apart, path = 2**30, tmp_path / "rows"
    with path.open("wb") as file:
        file.truncate(4 * (2 * apart + 2 * WIDTH))
    memory = torch.from_file(str(path), shared=True, size=2 * apart + 2 * WIDTH)
    path.unlink()
    z_s, z_t = (memory.as_strided((3, WIDTH), (apart, 1), start) for start in (0, WIDTH))
    for x in (z_s, z_t):
        x.copy_(torch.randn(3, WIDTH))
    expected, slope = run(backend, z_s, z_t, False, Divergence())
    out = RowOutputs(torch.full((len(RESULTS), 3), torch.nan))
    select_rows(backend, torch.device("cpu")).run(z_s, z_t, False, Divergence(), torch.ones(3), z_s, out, None)
    assert torch.equal(out.table, expected.table) and torch.equal(z_s, slope)
