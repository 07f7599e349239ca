"""CUDA row kernels in Triton: numerics of csrc/row.cpp, with `splits` programs per row that loop over tiles.

statistics  each program's sums, around the greatest student logit it has met so far
terms       JSD or a clip: merges the sums, then sums the terms of the value
gradient    merges everything of its row (the first program writes the results), then writes its columns

So both logit rows are read twice, three times where there are terms. Programs meet only in partial results, each
written by one of them and merged in a fixed order: no atomics, so two runs agree to the bit. Nothing but `out` and
`grad` is written to, and the logits that a later pass needs by index are kept apart, so that `grad` may be z_s.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from opsd_kernels.chunking import MAX_ROWS
from opsd_kernels.divergence import KINDS, Divergence
from opsd_kernels.launch import INTERPRETER, TABLE, Launch, Tile, label, launch_for
from opsd_kernels.rows import RowOutputs, apart_from
from opsd_kernels.triton_gradient import gradient_kernel
from opsd_kernels.triton_stats import statistics_kernel
from opsd_kernels.triton_sums import PARTS
from opsd_kernels.triton_terms import terms_kernel

KERNELS = {"statistics": statistics_kernel, "terms": terms_kernel, "gradient": gradient_kernel}


def obstacle(device: torch.device) -> str:
    """Why the kernels cannot run on a device, or ""."""
    if device.type == "cuda" or not isinstance(statistics_kernel, triton.JITFunction):  # the latter: the interpreter
        return ""
    return "it runs on cuda tensors, and on cpu tensors only in Triton's interpreter"


def scratch_bytes(vocab: int) -> int:
    return 4 * PARTS * max(launch.splits for launch in TABLE.values()) * MAX_ROWS


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
    launch = _launch(z_s, z_s if grad is None else grad, divergence)
    passes = Passes(z_s, z_t, is_delta, divergence, scale, grad, out, tokens, launch)
    for name in passes.names:
        passes.start(name)


class Passes:
    """The kernels of one call of run(), started one by one with a launch."""

    def __init__(
        self,
        z_s: Tensor,
        z_t: Tensor,
        is_delta: bool,
        divergence: Divergence,
        scale: Tensor,
        grad: Tensor | None,
        out: RowOutputs,
        tokens: Tensor | None,
        launch: Launch,
    ) -> None:
        assert len(z_s) < 2 or z_s.stride() == z_t.stride(), "the kernels take one stride for both"
        self.names, self.rows = names(divergence), z_s.shape[0]
        self.launch, self.divergence, self.is_delta, self.with_grad = launch, divergence, is_delta, grad is not None
        target = z_s if grad is None else grad
        self.tensors = {"z_s": z_s, "second": z_t, "tokens": tokens, "scale": scale, "grad": target, "out": out.table}
        self.tensors["parts"] = z_s.new_empty(z_s.shape[0], PARTS, launch.splits)
        self.numbers = {
            "vocab": z_s.shape[1],
            "stride": z_s.stride(0),
            "grad_stride": target.stride(0),
            "out_stride": out.table.stride(0),
            "inverse_t": 1.0 / divergence.temperature,
            "furthest": apart_from(divergence),
            "beta": divergence.beta,
            "clip": divergence.clip or 0.0,
        }

    def start(self, name: str) -> Any:
        """Launch a kernel; returns what Triton compiled."""
        kernel = KERNELS[name]
        arguments = {k: v for k, v in (self.tensors | self.numbers).items() if k in kernel.arg_names}
        splits = self.launch.splits if name != "gradient" or self.with_grad else 1
        compiled_for = constants(name, self.launch, self.divergence, self.is_delta, self.with_grad)
        return kernel[self.rows, splits](**arguments, **compiled_for)


def names(divergence: Divergence) -> tuple[str, ...]:
    """The kernels that a divergence needs, in order."""
    return ("statistics", "terms", "gradient") if divergence.needs_terms else ("statistics", "gradient")


def constants(
    name: str, launch: Launch, divergence: Divergence, is_delta: bool, with_grad: bool = True
) -> dict[str, int]:
    """What a kernel is compiled for: its constexpr arguments and num_warps."""
    tile: Tile = getattr(launch, name)
    found = {"tile": tile.columns, "stages": tile.stages, "num_warps": tile.warps}
    found |= {"splits": launch.splits, "count": PARTS, "delta": is_delta, "kind": KINDS.index(divergence.kind)}
    if name == "statistics":
        return found | {"lanes": min(tile.columns, 128 * tile.warps)}
    found["clips"] = divergence.clip is not None
    return found | ({"with_grad": with_grad} if name == "gradient" else {})


def _launch(z_s: Tensor, grad: Tensor, divergence: Divergence) -> Launch:
    if z_s.device.type != "cuda":
        return INTERPRETER
    major, minor = torch.cuda.get_device_capability(z_s.device)
    divided = label(divergence.kind, divergence.clip is not None)
    return launch_for(10 * major + minor, z_s.shape[1], str(grad.dtype).removeprefix("torch."), divided)
