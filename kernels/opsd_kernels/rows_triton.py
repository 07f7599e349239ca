"""CUDA row kernels in Triton: numerics of csrc/row.cpp, with `splits` programs per row that loop over tiles.

centre    each program's maximum of both rows and where the student's is
sums      merges the centres of its row, then sums its columns
terms     JSD or a clip: merges the sums, then sums the terms of the value
gradient  merges everything of its row (the first program writes the results), then writes its columns

Programs meet only in partial results, each written by one of them and merged in a fixed order: no atomics, so two
runs agree to the bit. Nothing but `out` and `grad` is written to, and z_s[a] is kept beside its index, so that
`grad` may be z_s.
"""

import torch
import triton
from torch import Tensor

from opsd_kernels.divergence import KINDS, Divergence
from opsd_kernels.launch import INTERPRETER, Launch, launch_for
from opsd_kernels.rows import RowOutputs
from opsd_kernels.triton_gradient import gradient_kernel
from opsd_kernels.triton_stats import PARTS, centre_kernel, sums_kernel
from opsd_kernels.triton_terms import terms_kernel


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or ""."""
    if device.type == "cuda" or not isinstance(sums_kernel, triton.JITFunction):  # the latter: the interpreter
        return ""
    return "it runs on cuda tensors, and on cpu tensors only in Triton's interpreter"


def scratch_bytes(vocab: int) -> int:
    return 4 * PARTS * 8 * 512


def run(
    z_s: Tensor,  # (n, V) fp32, consumed
    z_t: Tensor,  # (n, V) fp32, consumed; holds z_s - z_t when is_delta
    is_delta: bool,
    divergence: Divergence,
    scale: Tensor,  # (n,) fp32 weight of each row's gradient
    grad: Tensor | None,  # (n, V), may be z_s
    out: RowOutputs,
    tokens: Tensor | None = None,  # (n,) int64
) -> None:
    """Fill `out` and, unless None, grad = scale * d value / d (z_s / temperature)."""
    rows, vocab = z_s.shape
    launch = _launch(z_s.device)
    parts = torch.empty(rows, PARTS, launch.splits, device=z_s.device)
    kind, inverse_t, beta = KINDS.index(divergence.kind), 1.0 / divergence.temperature, divergence.beta
    same = {"delta": is_delta, "tile": launch.tile, "splits": launch.splits, "count": PARTS}
    same["num_warps"] = launch.warps
    stride = z_s.stride(0)
    grid = (rows, launch.splits)
    centre_kernel[grid](z_s, z_t, tokens, parts, vocab, stride, **same)
    sums_kernel[grid](z_s, z_t, parts, vocab, stride, inverse_t, kind=kind, **same)
    clips, clip = divergence.clip is not None, divergence.clip or 0.0
    if divergence.needs_terms:
        terms_kernel[grid](z_s, z_t, parts, vocab, stride, inverse_t, beta, clip, clips=clips, kind=kind, **same)
    target = z_s if grad is None else grad
    same["tile"] = gradient_tile(launch, divergence)
    gradient_kernel[grid if grad is not None else (rows, 1)](
        *(z_s, z_t, tokens, parts, scale, target, out.table, vocab, stride, target.stride(0), out.table.stride(0)),
        *(inverse_t, beta, clip),
        clips=clips,
        with_grad=grad is not None,
        kind=kind,
        **same,
    )


def gradient_tile(launch: Launch, divergence: Divergence) -> int:
    """Half a tile where a whole one spills (sm_120)."""
    return launch.tile // 2 if divergence.kind == "jsd" and divergence.clip is not None else launch.tile


def _launch(device: torch.device) -> Launch:
    if device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(device)
    return launch_for(10 * major + minor)
