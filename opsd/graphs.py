"""CUDA graphs of a step that always does the same to the same tensors.

Decoding a small model is bound by launches, about a thousand a step; a captured step is launched as one.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """Runs a step as it is the first time its key is seen (lazy initialisation must not be captured), captures it the
    second time, and replays it from then on. The key must change whenever shapes or addresses do."""

    def __init__(self) -> None:
        self._seen: set[Hashable] = set()
        self._captured: dict[Hashable, torch.cuda.CUDAGraph] = {}

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        if key not in self._seen:
            self._seen.add(key)
            step()
            return
        if key not in self._captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):  # records, and runs nothing
                step()
            self._captured[key] = graph
        self._captured[key].replay()
