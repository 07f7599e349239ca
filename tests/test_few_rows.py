"""Products of few rows: the values of nn.Linear, and layers that are their own again afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opsd.few_rows import few_rows, product


@pytest.mark.parametrize("outputs", [7, 128])
@pytest.mark.parametrize("shape", [(5,), (15, 5), (16, 5), (48, 5), (49, 5), (2, 3, 5), (0, 5), (1, 0, 5)], ids=str)
def test_product_equals_linear_and_is_contiguous(shape, outputs):
    x, weight = torch.randn(shape, dtype=torch.float64), torch.randn(outputs, 5, dtype=torch.float64)
    found = product(x, weight)
    torch.testing.assert_close(found, nn.functional.linear(x, weight))
    assert found.is_contiguous()


def test_large_layers_compute_alike_and_are_restored_after_an_error():
    module = nn.Sequential(
        nn.Linear(5, 1 << 16), nn.SiLU(), nn.Linear(1 << 16, 4, bias=False), nn.Linear(4, 4)
    ).double()
    x = torch.randn(3, 5, dtype=torch.float64)
    want = module(x)
    with few_rows(module):
        assert ["forward" in vars(layer) for layer in module] == [True, False, True, False]
        torch.testing.assert_close(module(x), want)
    with pytest.raises(RuntimeError), few_rows(module):
        module(torch.randn(3, 4))
    assert not any("forward" in vars(layer) for layer in module)
