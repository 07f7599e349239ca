"""Linear layers of a decode step on a CPU: y = x W' for few rows, computed as (W x')'.

MKL multiplies a tall matrix by a narrow one about twice as fast as the transposed product of 8 to 32 rows; from 64 rows
on it is the other way round. The sums are the same in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

_FEW = 48  # rows
_LARGE = 1 << 18  # weights of a matrix; below, turning it over costs more than it gains


def product(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
) -> Tensor:  # (..., V), contiguous: attention kernels ask for it
    """x W'."""
    rows = x.numel() // x.shape[-1]
    if x.device.type != "cpu" or not 0 < rows <= _FEW:
        return nn.functional.linear(x, weight)
    return (weight @ x.reshape(rows, -1).T).T.contiguous().view(*x.shape[:-1], -1)


@contextmanager
def few_rows(module: nn.Module) -> Iterator[None]:
    """Inside, the linear layers of a module on a CPU compute with `product`; on other devices nothing changes."""
    plain: list[Any] = [m for m in module.modules() if type(m) is nn.Linear and "forward" not in vars(m)]
    layers = [layer for layer in plain if layer.weight.device.type == "cpu" and layer.weight.numel() >= _LARGE]
    for layer in layers:
        layer.forward = partial(_forward, layer)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _forward(layer: nn.Linear, x: Tensor) -> Tensor:
    out = product(x, layer.weight)
    return out if layer.bias is None else out + layer.bias
