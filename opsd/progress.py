"""What a person sees of a run in the terminal: how far it is, what the last step measured, some answers."""

from __future__ import annotations

import sys
import time
from typing import Any, Protocol

from opsd.log import PHASES

# Colour of a token by its divergence (nats): the JSD of two distributions is at most ln 2 = 0.69.
_SHADES = ((0.3, "bold red"), (0.1, "dark_orange"), (0.03, "yellow"))


class Progress(Protocol):
    def step(self, record: dict[str, Any]) -> None:
        """Show a line of metrics.jsonl."""

    def say(self, text: str) -> None:
        """Show a text."""

    def sample(self, record: dict[str, Any]) -> None:
        """Show a line of samples.jsonl."""

    def close(self) -> None: ...


def left(seconds: float) -> str:
    """A time in its two largest units."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    days, hours = divmod(hours, 24)
    units = [(days, "d"), (hours, "h"), (minutes, "min"), (seconds, "s")]
    first = next((i for i, (count, _) in enumerate(units) if count), len(units) - 1)
    return " ".join(f"{count} {unit}" for count, unit in units[first : first + 2])


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
    if record.get("teacher_cache_hit_rate"):  # a teacher that moves has none
        parts.append(f"cache hits {record['teacher_cache_hit_rate']:.0%}")
    return "  ".join(parts) + ("  tok/s " + " ".join(speeds) if speeds else "")


class _Silent:
    def step(self, record: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def sample(self, record: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _Plain:
    """Lines for a log file: the first step, then one about every two seconds, and the last."""

    def __init__(self, steps: int):
        self.steps, self._last = steps, -1e9
        self._first: tuple[float, int] | None = None  # when the first step of this process was shown, and its number

    def step(self, record: dict[str, Any]) -> None:
        now, step = time.monotonic(), record["step"]
        self._first = self._first or (now, step)
        if now - self._last >= 2.0 or step >= self.steps:
            self._last = now
            print(f"step {step}/{self.steps}  {summary(record)}{self._time_left(now, step)}", flush=True)

    def say(self, text: str) -> None:
        print(text, flush=True)

    def sample(self, record: dict[str, Any]) -> None:
        """Each token with its divergence behind it where that is worth a look."""
        text = "".join(f"{token}[{d:.2f}]" if d >= _SHADES[-1][0] else token for token, d in _tokens(record))
        print(f"{_about(record)} {text}", flush=True)

    def _time_left(self, now: float, step: int) -> str:
        assert self._first is not None
        start, first = self._first
        return (
            f"  left {left((now - start) / (step - first) * (self.steps - step))}" if first < step < self.steps else ""
        )

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

    def sample(self, record: dict[str, Any]) -> None:
        """Each token in the colour of its divergence."""
        from rich.text import Text

        line = Text(_about(record) + " ", style="dim")
        for token, divergence in _tokens(record):
            line.append(token, style=next((style for least, style in _SHADES if divergence >= least), "default"))
        self._live.console.print(line)

    def close(self) -> None:
        self._live.stop()


def _about(record: dict[str, Any]) -> str:
    return f"step {record['step']}  {record['id']} ({record['label'] or 'no label'}):"


def _tokens(record: dict[str, Any]) -> list[tuple[str, float]]:
    """What each token added and its divergence; the whole text and 0 where there is no teacher, or no finite number."""
    values = [value or 0.0 for value in record.get("divergence", [0.0])]
    return list(zip(record.get("tokens", [record["response"]]), values, strict=True))
