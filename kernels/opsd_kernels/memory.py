"""Where a sweep gets its workspace. On a CPU it stays for the next call, and the system may take it back meanwhile.

Memory that a process has not touched yet is cleared by the system page by page: about a tenth of a whole call, more in
huge pages of a virtual machine that has given free memory back to its host. A workspace that stays is cleared once.
Between calls it is marked MADV_FREE: it counts as resident, and where memory runs short it is the first to go.
"""

import ctypes
import functools
import mmap
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import torch
from torch import Tensor

HUGE_PAGE = 1 << 21  # bytes; a smaller tensor comes from the allocator's heap, which keeps what is freed
Empty = Callable[..., Tensor]  # (*shape, dtype=torch.float32) -> uninitialized tensor

# No lock guards them, which a fork at the wrong moment would leave locked in the child: each step below is atomic.
_keeps = True
_kept: list[Tensor] = []  # blocks of bytes that the last sweep used


def keep_workspace(keep: bool) -> bool:
    """Whether CPU workspaces stay for the next call (the default), or go when a call ends; returns what was so far.

    A program that counts its resident bytes, or calls once in a long while, may not want them to stay.
    """
    global _keeps
    before, _keeps = _keeps, keep
    if not keep:
        _kept.clear()
    return before


@contextmanager
def workspace(device: torch.device) -> Iterator[Empty]:
    """What makes the tensors of one sweep on this device, which end with it."""
    plain = device.type == "cpu" and type(torch.empty(0, device=device)) is Tensor  # no fake one, which has no memory
    if not plain or not _keeps or _madvise() is None:
        yield functools.partial(torch.empty, dtype=torch.float32, device=device)
        return
    found = _taken()
    used: list[Tensor] = []

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        need = torch.Size(shape).numel() * dtype.itemsize
        if need < HUGE_PAGE:
            return torch.empty(*shape, dtype=dtype, device=device)
        fitting = [i for i, block in enumerate(found) if block.nbytes >= need]
        if not fitting:
            found.clear()  # a larger call: the blocks of a smaller one would be held beside its own
        used.append(found.pop(fitting[0]) if fitting else _block(need))
        return used[-1][:need].view(dtype).view(shape)

    try:
        yield empty
    finally:
        for block in used:
            _advise(block, mmap.MADV_FREE)
        _kept[:] = used
        if not _keeps:  # asked for during the sweep
            _kept.clear()


def _taken() -> list[Tensor]:
    """All that is kept, for one sweep: another in its midst, or in another thread, finds none and makes its own."""
    blocks: list[Tensor] = []
    with suppress(IndexError):
        while True:
            blocks.append(_kept.pop(0))
    return blocks


def _block(size: int) -> Tensor:
    block = torch.empty(size, dtype=torch.uint8, device="cpu")
    _advise(block, mmap.MADV_HUGEPAGE, HUGE_PAGE)
    return block


def _advise(block: Tensor, advice: int, page: int = mmap.PAGESIZE) -> None:
    """Of the whole pages of a block; a refusal changes nothing but speed."""
    start = -(-block.data_ptr() // page) * page
    end = (block.data_ptr() + block.nbytes) // page * page
    madvise = _madvise()
    if end > start and madvise is not None:
        madvise(start, end - start, advice)


@functools.cache
def _madvise() -> "ctypes._NamedFuncPointer | None":
    if sys.platform != "linux" or not hasattr(mmap, "MADV_FREE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function
