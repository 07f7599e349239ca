"""The Triton statistics pass moves its sums from centre to centre: rows that make it do so, in many small tiles."""

import pytest
import torch

from opsd_kernels import Divergence
from opsd_kernels.reference import by_products
from tests.kernels import cases
from tests.kernels.test_rows import run, truth

pytestmark = pytest.mark.skipif(not cases.INTERPRETED, reason="Triton only")
WIDTH = 500


def rows():
    """(4, WIDTH) student logits and z_s - z_t of each."""
    g = torch.Generator().manual_seed(11)
    noise, small = torch.randn(4, WIDTH, generator=g), 1e-3 * torch.randn(4, WIDTH, generator=g)
    ascending = noise[0].sort().values * 3
    saturated = noise[1].clone()
    saturated[WIDTH - 40] = 25.0  # the last split has all of the mass
    flat = 0.1 * noise[2]
    z_s = torch.stack([ascending, saturated, flat, noise[3]])
    delta = small.clone()
    delta[0] += torch.linspace(-4, 4, WIDTH)  # every centre is far from the one before
    delta[2, :64] += 2.0  # nothing that the first tile adds is near the rest
    delta[3] += 30.0  # an offset, which is no difference at all
    return z_s, delta


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    from opsd_kernels import rows_triton
    from opsd_kernels.launch import Launch, Tile

    monkeypatch.setattr(rows_triton, "INTERPRETER", Launch.of(Tile(64, 1), splits=4))


@pytest.mark.parametrize("kind", cases.DIVERGENCES)
@pytest.mark.parametrize("is_delta", [True, False], ids=["delta", "pair"])
def test_same_as_fp64(kind, is_delta):
    z_s, delta = rows()
    second = delta if is_delta else z_s - delta
    divergence = Divergence(kind, beta=0.3, temperature=0.9)
    expected, gradient, z_t = truth(z_s, second, is_delta, divergence)
    out, found = run("triton", z_s, second, is_delta, divergence)
    truly = by_products(z_s.double(), z_t.double(), divergence, torch.zeros(4, dtype=torch.int64))
    for name in ("student_entropy", "teacher_entropy", "student_lse", "teacher_lse", "top1_agreement"):
        torch.testing.assert_close(out[name].double(), truly[name], rtol=3e-6, atol=3e-6)
    # an offset of 30 leaves pairs of logits that are exact to 2e-6, differences that are exact to 2e-7
    torch.testing.assert_close(out["value"].double(), expected, rtol=2e-6 if is_delta else 1e-5, atol=2e-9)
    error = (found.double() - 0.9 * gradient).norm(dim=1)
    assert (error <= 2e-6 * gradient.norm(dim=1) + 1e-8).all(), error


@pytest.mark.parametrize("kind", cases.DIVERGENCES)
def test_tiles_without_a_student_or_without_a_teacher(kind):
    """Whole tiles that one side excludes, before and behind the other's: finite wherever the divergence is."""
    z_s, delta = rows()
    z_s, z_t = z_s[:3].clone(), (z_s - delta)[:3].clone()
    if kind != "forward_kl":
        z_s[0, :130] = -torch.inf
        z_s[1, 300:400] = -torch.inf
    if kind != "reverse_kl":
        z_t[1, :130] = -torch.inf
        z_t[2, 300:] = -torch.inf
    divergence = Divergence(kind)
    expected, gradient, _ = truth(z_s, z_t, False, divergence)
    out, found = run("triton", z_s, z_t, False, divergence)
    assert expected.isfinite().all()
    torch.testing.assert_close(out["value"].double(), expected, rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(found.double(), gradient, rtol=1e-4, atol=1e-8)
    assert out.table.isfinite().all()
