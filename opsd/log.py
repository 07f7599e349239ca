"""The run directory: metrics, evaluations, samples; the clock and the memory they tell of.

RUN/config.yaml         the resolved config
RUN/metrics.jsonl       one line per logged step
RUN/evaluations.jsonl   one line per evaluation
RUN/answers.jsonl       one line per row of an evaluation: what was answered
RUN/samples.jsonl       sampled responses
RUN/checkpoints/        see `opsd.checkpoint`
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from opsd import durable
from opsd.errors import InputError, writing

PHASES = ("rollout", "teacher", "student")


class RunDir:
    """Append-only JSONL files under one folder. Each line is flushed, so a killed run keeps what it measured."""

    FILES = ("metrics", "evaluations", "answers", "samples")

    def __init__(self, path: Path, writes: bool = True):
        """writes: False for a process that leaves the writing to another."""
        self.path, self.writes = path, writes
        self.checkpoints = path / "checkpoints"
        self.listeners: list[Callable[[str, dict[str, Any]], None]] = []  # they hear every record

    def append(self, name: str, *records: dict[str, Any]) -> None:
        if not self.writes:
            return
        file = self.path / f"{name}.jsonl"
        with writing(file), file.open("a", encoding="utf-8") as stream:
            stream.write("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
        for listener in self.listeners:
            for record in records:
                listener(name, record)

    def read(self, name: str) -> list[dict[str, Any]]:
        """The whole lines of a file; the half line a kill may have left is not one."""
        file = self.path / f"{name}.jsonl"
        if not file.exists():
            return []
        lines = file.read_text(encoding="utf-8").split("\n")[:-1]
        records = []
        for number, line in enumerate(lines, start=1):
            try:
                records.append(json.loads(line))
            except ValueError as error:
                raise InputError("a JSON record", str(error), file=file, line=number) from error
        return records

    def sync(self) -> None:
        """Return when every line written so far is on the disk."""
        for path in [self.path / f"{name}.jsonl" for name in self.FILES]:
            if path.exists():
                durable.sync(path)

    def rewind(self, step: int) -> None:
        """Forget what was logged after `step` updates: a resumed run will do those steps again."""
        for name in self.FILES:
            file = self.path / f"{name}.jsonl"
            if file.exists():
                kept = [record for record in self.read(name) if record["step"] <= step]
                durable.write_text(file, "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in kept))


class Clock:
    """Seconds per phase. On CUDA a phase ends when its kernels do, which is only asked when a line is logged."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        start = self._now()
        yield
        self._spans.setdefault(name, []).append((start, self._now()))

    def read(self) -> dict[str, float]:
        """Seconds per phase since the last read."""
        if self.cuda:
            torch.cuda.synchronize()
        seconds = {n: sum(self._between(a, b) for a, b in spans) for n, spans in self._spans.items()}
        self._spans.clear()
        return seconds

    def _now(self) -> Any:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _between(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


def peak_memory_mib(device: torch.device) -> float:
    """Peak allocated device memory, or the peak resident set of the process on a CPU (MiB)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10  # bytes there, KiB elsewhere
