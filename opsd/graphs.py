"""CUDA graphs of a step that always does the same to the same tensors.

Decoding a small model is bound by launches, about a thousand a step; a captured step is launched as one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import torch


class Graphs:
    """Runs a step as it is the first time its key is seen (lazy initialisation must not be captured), captures it the
    second time, and replays it from then on. The key must change whenever shapes or addresses do.

    The graphs share one pool of memory: a step leaves its results in tensors of its caller, so that what it needs in
    between may be overwritten by the next one.
    """

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}
        self._pool: Any = None

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        if key not in self._seen:
            self._seen.add(key)
            step()
            return
        if key not in self._captured:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool):  # records, and runs nothing
                step()
            self._captured[key] = graph
        self._captured[key].replay()


def obstacle(decoder: Any, bf16: bool, capability: tuple[int, int]) -> str | None:
    """Why a decode step on a CUDA device cannot be captured, or None.

    A mixture of experts can where one kernel takes all experts: torch's grouped GEMM, from Hopper on, in bf16. Anywhere
    else the host is told how many tokens each expert gets.
    """
    config = decoder.config
    if not (getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)):
        return None
    grouped = getattr(config, "_experts_implementation", None) == "grouped_mm"
    if grouped and bf16 and capability >= (9, 0):
        return None
    return "its experts are called one by one"
