"""Linear layers of a decode step on a CPU: y = x W' for few rows, which is mostly reading W.

MKL takes two to four times as long for 8 rows as reading the weights does. As a batch of small products, one for each
slice of 64 outputs, it comes near to reading, for up to 15 rows. From 16 to 48 rows (W x')' is faster than x W'; beyond
it is the other way round. The sums are the same in another order.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

_SLICE = 64  # outputs
_IN_SLICES, _TURNED = 15, 48  # rows, at most
_LARGE = 1 << 18  # weights of a matrix; below, either way costs more than it gains


def product(
    x: Tensor,  # (..., D)
    weight: Tensor,  # (V, D)
) -> Tensor:  # (..., V), contiguous: attention kernels ask for it
    """x W'."""
    size, width = weight.shape
    rows = x.numel() // width
    if x.device.type != "cpu" or not 0 < rows <= _TURNED:
        return nn.functional.linear(x, weight)
    flat = x.reshape(rows, width)
    if rows <= _IN_SLICES and size % _SLICE == 0 and torch.backends.mkl.is_available():
        slices = weight.unflatten(0, (-1, _SLICE))
        out = (flat.expand(len(slices), -1, -1) @ slices.mT).transpose(0, 1)
    else:
        out = (weight @ flat.T).T
    return out.reshape(rows, size).contiguous().view(*x.shape[:-1], size)


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
