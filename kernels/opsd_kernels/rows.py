"""Choice of the row kernel, the only backend-specific code: logits of a chunk in, values and gradients out."""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence

BACKENDS = ("auto", "triton", "native", "torch")
_log = logging.getLogger("opsd_kernels")
_announced: set[str] = set()


RESULTS = (
    *("value", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse", "top1_agreement"),
    *("student_logprob", "teacher_logprob", "clip_fraction"),
)


@dataclass(frozen=True)
class RowOutputs:
    """Per-token results: `table` (len(RESULTS), n) fp32 holds one of them per row, out["value"] is (n,)."""

    table: Tensor

    def __getitem__(self, name: str) -> Tensor:
        return self.table[RESULTS.index(name)]

    def rows(self, s: slice) -> "RowOutputs":
        return RowOutputs(self.table[:, s])


class RowKernel(Protocol):
    """A module with these two functions; rows_torch.py documents them."""

    def scratch_bytes(self, vocab: int) -> int: ...

    def run(
        self,
        z_s: Tensor,
        z_t: Tensor,
        is_delta: bool,
        divergence: Divergence,
        scale: Tensor,
        grad: Tensor | None,
        out: RowOutputs,
        tokens: Tensor | None,
    ) -> None: ...


def select_rows(backend: str, device: torch.device) -> RowKernel:
    """The row kernel for a backend name: "auto" is triton on CUDA, native on CPU, torch where neither exists.

    Raises ValueError when the named backend cannot run, and says why. The choice is logged once.
    """
    if backend not in BACKENDS:
        raise ValueError(f"expected backend out of {', '.join(BACKENDS)}, got {backend!r}")
    name, why_not = backend, ""
    if backend == "auto":
        name = "triton" if device.type == "cuda" else "native" if device.type == "cpu" else "torch"
        why_not = _obstacle(name, device)
        name = "torch" if why_not else name
    elif why := _obstacle(backend, device):
        raise ValueError(f"expected backend={backend!r} to be available for {device.type} tensors, got: {why}")
    key = f"{name} row kernels on {device.type}" + (f" ({why_not})" if why_not else "")
    if key not in _announced:
        _announced.add(key)
        _log.log(logging.WARNING if why_not else logging.INFO, "fused_token_kl uses %s", key)
    return _load(name)


def _obstacle(name: str, device: torch.device) -> str:
    """Why the backend cannot run, or ""."""
    if name == "torch":
        return ""
    if name == "native":
        from opsd_kernels import rows_native

        return "it runs on cpu tensors only" if device.type != "cpu" else rows_native.obstacle()
    try:
        from opsd_kernels import rows_triton
    except ImportError as error:
        return f"triton cannot be imported ({error})"
    return rows_triton.obstacle(device)


def _load(name: str) -> RowKernel:
    import importlib

    module: RowKernel = importlib.import_module(f"opsd_kernels.rows_{name}")
    return module
