"""CPU row kernel: binding of the C++ library in kernels/csrc, which the build puts beside this file."""

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

from opsd_kernels.divergence import KINDS, Divergence
from opsd_kernels.rows import RowOutputs

LIBRARY = Path(__file__).with_name("_rows.so")
ABI = 3


def obstacle() -> str:
    """Why the library cannot be used, or ""."""
    if not LIBRARY.exists():
        return f"{LIBRARY.name} was not built; reinstall with a C++ compiler and cmake on the PATH"
    try:
        _library()
    except (OSError, RuntimeError) as error:
        return f"{LIBRARY.name} cannot be loaded ({error})"
    return ""


@functools.cache
def _library() -> ctypes.CDLL:
    library = ctypes.CDLL(str(LIBRARY))
    library.opsd_rows_abi.restype = ctypes.c_int
    if library.opsd_rows_abi() != ABI:
        raise RuntimeError(f"expected ABI {ABI}, got {library.opsd_rows_abi()}: reinstall")
    library.opsd_rows_isa.restype = ctypes.c_char_p
    pointer, i64 = ctypes.c_void_p, ctypes.c_int64
    library.opsd_rows_run.restype = None
    library.opsd_rows_run.argtypes = [
        *(pointer, pointer, i64, i64, i64, i64),  # z_s, z_t, rows, vocab, stride of each
        *(ctypes.c_int, ctypes.c_int),  # is_delta, kind
        *(ctypes.c_float, ctypes.c_float, ctypes.c_float),  # beta, 1 / temperature, clip
        *(pointer, pointer, pointer, i64),  # tokens, scale, grad, its stride
        *(pointer, i64, ctypes.c_int),  # results, their stride, threads
    ]
    return library


def instruction_set() -> str:
    """The variant that this processor runs: "avx512", "avx2", "neon" or "generic"."""
    name: bytes = _library().opsd_rows_isa()
    return name.decode()


def scratch_bytes(vocab: int) -> int:
    """A row of exponentials for every thread."""
    return 4 * vocab * torch.get_num_threads()


def run(
    z_s: Tensor,  # (n, V) fp32, consumed
    z_t: Tensor,  # (n, V) fp32; holds z_s - z_t when is_delta
    is_delta: bool,
    divergence: Divergence,
    scale: Tensor,  # (n,) fp32 weight of each row's gradient
    grad: Tensor | None,  # (n, V) fp32, may be z_s
    out: RowOutputs,
    tokens: Tensor | None = None,  # (n,) int64
) -> None:
    """Fill `out` and, unless None, grad = scale * d value / d (z_s / temperature)."""
    rows, vocab = z_s.shape
    _library().opsd_rows_run(
        *(z_s.data_ptr(), z_t.data_ptr(), rows, vocab, z_s.stride(0), z_t.stride(0)),
        *(is_delta, KINDS.index(divergence.kind), divergence.beta, 1.0 / divergence.temperature),
        math.inf if divergence.clip is None else divergence.clip,
        *(None if tokens is None else tokens.data_ptr(), scale.data_ptr()),
        *(None if grad is None else grad.data_ptr(), 0 if grad is None else grad.stride(0)),
        *(out.table.data_ptr(), out.table.stride(0), torch.get_num_threads()),
    )
