"""bf16 products over fp32 weights: torch.autocast, and the same on meta tensors, for which torch has none."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_PRODUCTS = {nn.functional.linear, torch.matmul, torch.bmm, torch.mm, torch.baddbmm, torch.addmm, Tensor.matmul}
_PRODUCTS |= {Tensor.__matmul__, nn.functional.conv1d, nn.functional.conv2d, nn.functional.conv3d}
_open: list[OnMeta] = []


def autocast(device: torch.device, dtype: torch.dtype) -> AbstractContextManager[Any]:
    """torch.autocast of a device; on meta its shapes and dtypes, and what it keeps alive."""
    return OnMeta(dtype) if device.type == "meta" else torch.autocast(device.type, dtype=dtype)


def dtype_on(device: torch.device) -> torch.dtype | None:
    """The dtype autocast computes in on this device now; None where it is off."""
    if device.type == "meta":
        return _open[-1].dtype if _open else None
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else None


class OnMeta(TorchFunctionMode):
    """Products in a half dtype, the cast of a weight made once and kept until the context ends."""

    def __init__(self, dtype: torch.dtype):
        self.dtype = dtype
        self._casts: dict[Tensor, Tensor] = {}

    def __enter__(self) -> Any:
        _open.append(self)
        return super().__enter__()

    def __exit__(self, *reason: Any) -> None:
        super().__exit__(*reason)
        _open.remove(self)
        self._casts.clear()

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PRODUCTS:
            args = [self._cast(x) for x in args]
            kwargs = {name: self._cast(x) for name, x in kwargs.items()}
        return func(*args, **kwargs)

    def _cast(self, x: Any) -> Any:
        if not isinstance(x, Tensor) or x.dtype != torch.float32 or x.device.type != "meta":
            return x
        if not (x.is_leaf and x.requires_grad):
            return x.to(self.dtype)
        if x not in self._casts:
            self._casts[x] = x.to(self.dtype)
        return self._casts[x]
