"""Which step is run, captured and replayed when: torch.cuda's graphs mimicked by ones that note what was recorded."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import pytest
import torch

from opsd.graphs import Graphs


class Device:
    """Runs what it is given; while a graph is captured it only writes down."""

    def __init__(self) -> None:
        self.ran, self.recording, self.pools = list[str](), None, list[Any]()

    def do(self, what: str) -> None:
        (self.ran if self.recording is None else self.recording).append(what)


@pytest.fixture
def device(monkeypatch):
    found = Device()

    class Graph:
        def __init__(self) -> None:
            self.recorded = list[str]()

        def replay(self) -> None:
            found.ran.extend(self.recorded)

    @contextmanager
    def capture(graph: Graph, pool: Any):
        found.pools.append(pool)
        found.recording = graph.recorded
        yield
        found.recording = None

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    return found


def test_a_step_runs_once_a_call_whether_it_is_captured_or_not(device):
    graphs, called = Graphs(), []

    def step(name: str) -> None:
        called.append(name)
        device.do(name)

    order = ["a", "a", "b", "a", "b", "a", "b", "b"]
    for name in order:
        graphs.run(name, lambda name=name: step(name))
    assert device.ran == order
    assert called == ["a", "a", "b", "b"], "as it is, then to be captured; replays call nobody"
    assert len(set(map(id, device.pools))) == 1, "one pool of memory"
