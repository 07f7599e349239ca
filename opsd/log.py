"""The run directory and what a person sees: metrics, samples, evaluations, progress.

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
from typing import Any, Protocol

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


class Progress(Protocol):
    def step(self, record: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


def make_progress(kind: str, steps: int) -> Progress:
    """`rich` on a terminal, plain lines elsewhere, nothing for "none"."""
    if kind == "none":
        return _Silent()
    if kind == "plain" or (kind == "auto" and not sys.stdout.isatty()):
        return _Plain(steps)
    return _Rich(steps)


def summary(record: dict[str, Any]) -> str:
    """One line of a step's metrics; what a step does not have (no teacher, no rollout) is left out."""
    names = {"loss": "loss", "divergence": "div/token", "accuracy": "accuracy", "response_length": "length"}
    parts = [f"{label} {record[name]:.4g}" for name, label in names.items() if name in record]
    speeds = [f"{phase} {record[key]:.0f}" for phase in PHASES if (key := f"{phase}_tokens_per_second") in record]
    if "saved_tokens" in record:
        parts.append(f"saved {record['saved_tokens']:.0%}")
    return "  ".join(parts) + ("  tok/s " + " ".join(speeds) if speeds else "")


class _Silent:
    def step(self, record: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def close(self) -> None: ...


class _Plain:
    """Lines for a log file: the first step, then one about every two seconds, and the last."""

    def __init__(self, steps: int):
        self.steps, self._last = steps, -1e9

    def step(self, record: dict[str, Any]) -> None:
        now = time.monotonic()
        if now - self._last >= 2.0 or record["step"] >= self.steps:
            self._last = now
            print(f"step {record['step']}/{self.steps}  {summary(record)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def close(self) -> None: ...


class _Rich:
    """A bar with the time left, and under it what the last logged step measured."""

    def __init__(self, steps: int):
        from rich.live import Live
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar = Progress(TextColumn("step"), MofNCompleteColumn(), BarColumn(), TimeRemainingColumn())
        self._task = self._bar.add_task("", total=steps)
        self._live = Live(self._bar)
        self._live.start()

    def step(self, record: dict[str, Any]) -> None:
        from rich.console import Group
        from rich.text import Text

        self._bar.update(self._task, completed=record["step"])
        self._live.update(Group(self._bar, Text(summary(record).replace("  tok/s ", "\ntokens/s  "))))

    def say(self, text: str) -> None:
        self._live.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._live.stop()
