"""Choice of the row kernel, the only backend-specific code: logits of a chunk in, values and gradients out."""

import logging
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence
from opsd_kernels.heads import VocabShard

BACKENDS = ("auto", "triton", "native", "torch")
_log = logging.getLogger("opsd_kernels")
_announced: set[str] = set()

RESULTS = (
    *("value", "student_entropy", "teacher_entropy", "student_lse", "teacher_lse", "top1_agreement"),
    *("student_logprob", "teacher_logprob", "clip_fraction"),
)
# A teacher surer of another token than of a by so much is centred at its own maximum, not at a. This is so far above
# ln V that c, at most ln V around both maxima and t_max - ln V or more around a, is then the smaller one.
APART = 30.0
# Not for a reverse KL without a clip, whose gradient p (d - sum p d) lives around a, and whose value is as large as c:
# there only a teacher that excludes a.
EXCLUDED = 3.4028235e38
APPROXIMATED = ("full_divergence", "student_tail_mass", "teacher_tail_mass")  # with a support only


def apart_from(divergence: Divergence) -> float:
    """How far t_max is at most with both sides centred at a."""
    return EXCLUDED if divergence.kind == "reverse_kl" and divergence.clip is None else APART


def results_of(divergence: Divergence) -> tuple[str, ...]:
    return RESULTS if divergence.support is None else RESULTS + APPROXIMATED


@dataclass(frozen=True)
class RowOutputs:
    """Per-token results: `table` (results, n) fp32 holds one of results_of per row, out["value"] is (n,)."""

    table: Tensor

    @property
    def names(self) -> tuple[str, ...]:
        return (RESULTS + APPROXIMATED)[: self.table.shape[0]]

    def __getitem__(self, name: str) -> Tensor:
        return self.table[self.names.index(name)]

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


def row_kernel(
    backend: str, device: torch.device, divergence: Divergence, shard: VocabShard | None, workspace_mib: float
) -> RowKernel:
    """What runs on the rows of a call: the row kernel of the backend, or what a support or a group puts around it.

    Raises ValueError as select_rows does, and for a named backend that cannot reduce over a group.
    """
    if shard is None and divergence.support is None:
        return select_rows(backend, device)
    from opsd_kernels.rows_parallel import ParallelRows
    from opsd_kernels.rows_topk import TopKRows
    from opsd_kernels.rows_torch import slab_elements

    elements = slab_elements(workspace_mib)
    if shard is None:
        return TopKRows(select_rows(backend, device), elements)
    if backend not in ("auto", "torch"):
        raise ValueError(f"expected backend auto or torch for a vocabulary in slices, got {backend!r}")
    return ParallelRows(shard, elements)


def select_rows(backend: str, device: torch.device) -> RowKernel:
    """The row kernel for a backend name: "auto" is triton on CUDA, native on CPU, torch where neither exists.

    Raises ValueError when the named backend cannot run, and says why. The choice is logged once.
    """
    if not isinstance(backend, str) or backend not in BACKENDS:
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
