"""Memory that tensors on a CPU have freed stays with the process.

glibc returns a large block to the system when it is freed and gets it back page by page, each page cleared, for the
next tensor of that size: time that every operation of a step on a CPU would pay again.
"""

from __future__ import annotations

import ctypes
import sys

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # parameters of mallopt(3)
_LARGEST = 1 << 30  # bytes; what is larger is rare, and goes back


def keep_freed_memory() -> bool:
    """Ask the allocator of this process to; False where it is not glibc's.

    Blocks of up to 1 GiB come from the heap, and the heap does not shrink. The peak is what it was.
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _LARGEST)) and bool(mallopt(_TRIM_THRESHOLD, 2**31 - 1))
