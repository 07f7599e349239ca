"""From the host to the device without waiting for what the device is doing.

A copy from pageable memory waits, so on CUDA a tensor goes through pinned memory; torch keeps that block until the
copy has happened.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x, a tensor of the host, on the device, in the order of its current stream."""
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.pin_memory()
    return x.to(device, non_blocking=True)


def indices(values: Sequence[int], device: torch.device) -> Tensor:
    """(n,) int64 on the device."""
    return to_device(torch.tensor(values, dtype=torch.long), device)
