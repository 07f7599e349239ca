"""The products that make the logits: what they are does not depend on how many rows they have, where MKL lets it."""

import pytest
import torch

from opsd_kernels import gemm
from tests.kernels import cases

pytestmark = pytest.mark.skipif(cases.INTERPRETED, reason="does not depend on the row kernel")
FEW, MANY = (1, 3, 7, 8, 15, 16, 17, 40, 100), 160
known = pytest.mark.skipif(
    not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512",
    reason="known of MKL's kernels for AVX-512 only",
)


@pytest.fixture(params=[1, 2])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


def operands(width, vocab=9001, dtype=torch.float32):
    g = torch.Generator().manual_seed(width)
    return torch.randn(MANY, width, generator=g).to(dtype), torch.randn(vocab, width, generator=g).to(dtype)


def logits(hidden, head, scratch=None):
    out = torch.full((len(hidden), len(head)), torch.nan)
    gemm.logits_into(out, hidden, head, scratch)
    return out


@known
@pytest.mark.parametrize("width", [48, 256, 576, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_row_does_not_depend_on_the_rows_beside_it(width, dtype, threads):
    hidden, head = operands(width, dtype=dtype)
    widths = (None, None) if dtype == torch.float32 else (torch.empty(9001, width), torch.empty(4501, width))
    whole = logits(hidden, head, widths[0])
    for rows in FEW:
        assert torch.equal(logits(hidden[:rows], head, widths[1]), whole[:rows]), rows


@pytest.mark.parametrize("rows", [1, 15, 16, MANY])
@pytest.mark.parametrize("width", [48, 768, 769, 1600])
def test_every_part_of_the_width_counts_once(rows, width, threads):
    hidden, head = operands(width, vocab=2050)
    hidden = hidden[:rows]
    exact = hidden.double() @ head.double().mT
    assert (logits(hidden, head).double() - exact).norm() <= 1e-6 * exact.norm()


@pytest.mark.parametrize(("size", "most", "lengths"), [(5, 5, [5]), (2049, 2048, [1024, 1025]), (7, 3, [2, 2, 3])])
def test_slices_are_even(size, most, lengths):
    slices = list(gemm.even_slices(size, most))
    assert [one.stop - one.start for one in slices] == lengths
    assert [i for one in slices for i in range(size)[one]] == list(range(size))
