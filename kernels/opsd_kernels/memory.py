"""Memory for tensors that are large, new and written once: the workspace and the head's gradient.

Their first touch in pages of 4 KiB takes a tenth of a whole step on a CPU; Linux hands out pages of 2 MiB where a
program asks for them.
"""

import ctypes
import functools
import mmap
import sys

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21


def empty(*shape: int, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """torch.empty, in huge pages where a CPU tensor is large enough and the system has them."""
    x = torch.empty(*shape, device=device, dtype=dtype)
    if device.type == "cpu":
        _advise_huge_pages(x)
    return x


def _advise_huge_pages(x: Tensor) -> None:
    start = -(-x.data_ptr() // HUGE_PAGE) * HUGE_PAGE
    end = (x.data_ptr() + x.nbytes) // HUGE_PAGE * HUGE_PAGE
    if end > start and (madvise := _madvise()) is not None:
        madvise(start, end - start, mmap.MADV_HUGEPAGE)  # advice: a refusal changes nothing but speed


@functools.cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    if sys.platform != "linux" or not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
