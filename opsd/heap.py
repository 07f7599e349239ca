"""Memory that small tensors on a CPU have freed stays with the process; that of large ones goes back to the system.

glibc returns what is free at the end of its heap, and gets it back page by page, each page cleared, for the next
tensors: time that every small operation of a step on a CPU would pay again. Large blocks it keeps in the heap too, once
one of them was freed; those of torch are aligned, for which glibc 2.36 does not find the holes that the same tensors
left: a step came to hold two to three times what its tensors take (bench/NOTES.md). In pages of their own they leave
no holes, and computing with them takes longer than clearing them - except where the model is so small that a step is
mostly such clearing, and the holes are small change.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGE, _ALL = 1 << 18, 1 << 30  # bytes of a block
_SMALL_MODEL = 16 << 20  # bytes


def keep_freed_memory(weights: int) -> bool:
    """Ask the allocator of this process to; False where it is not glibc's.

    Blocks of less than 256 KiB come from the heap, and the heap does not shrink. Of a model whose weights are less
    than 16 MiB, blocks of up to 1 GiB do. weights: bytes.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    large = _ALL if weights < _SMALL_MODEL else _LARGE
    return bool(mallopt(_MMAP_THRESHOLD, large)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
