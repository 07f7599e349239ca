"""The run's numbers to where people watch: TensorBoard, Weights & Biases, trackio (`log.to`).

A tracker listens to the run directory: each line of metrics.jsonl goes out under `train/`, each evaluation under
`evaluate/SPLIT-VIEW/`, with its step. The JSONL files stay the record. A tracker that fails in the middle of a run is
said once and given up; one that is not installed, or cannot begin, ends the run before its first step.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

from opsd.config import Config
from opsd.errors import InputError, explained
from opsd.log import RunDir
from opsd.say import say_once


class Tracker(Protocol):
    def log(self, values: dict[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class Listener:
    """Hands the lines of a run directory to a tracker."""

    def __init__(self, name: str, tracker: Tracker):
        self.name, self.tracker, self.failed = name, tracker, False

    def __call__(self, file: str, record: dict[str, Any]) -> None:
        """file: of the run directory, without `.jsonl`."""
        values = scalars(file, record)
        if values:
            self._try(lambda: self.tracker.log(values, record["step"]))

    def close(self) -> None:
        self._try(self.tracker.close)

    def _try(self, act: Callable[[], None]) -> None:
        if self.failed:
            return
        try:
            act()
        except Exception as error:  # somebody else's network or disk: a run of days goes on
            self.failed = True
            say_once(
                f"{self.name} gets no more numbers: {type(error).__name__}: {error}; metrics.jsonl has all of them"
            )


def scalars(file: str, record: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line by the names that trackers show; nothing of samples and answers."""
    if file == "evaluations":
        prefix = f"evaluate/{record['split']}-{record['view']}/"
    elif file == "metrics":
        prefix = "train/"
    else:
        return {}
    numbers = {k: v for k, v in record.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {prefix + name: float(value) for name, value in numbers.items() if name != "step"}


def find(config: Config) -> dict[str, Any]:
    """The module of each of `log.to`. Raises InputError for one that is not installed."""
    found: dict[str, Any] = {}
    for name in config.log.to:
        try:
            found[name] = importlib.import_module("torch.utils.tensorboard" if name == "tensorboard" else name)
        except ImportError as error:
            hint = f"pip install {name}"
            raise InputError(f"{name} to be installed", str(error), field="log.to", hint=hint) from error
    return found


@contextmanager
def listening(config: Config, directory: RunDir) -> Iterator[None]:
    """Inside, the trackers of the config hear what is appended to the run directory. Raises InputError for one that
    does not begin."""
    with ExitStack() as stack:
        for name, module in find(config).items():
            with explained(f"{name} to begin", field="log.to"):
                listener = Listener(name, _OPEN[name](module, config, directory.path))
            stack.callback(listener.close)
            directory.listeners.append(listener)
        yield


class _TensorBoard:
    """RUN/tensorboard/; a resumed run hides what it will do again."""

    def __init__(self, module: Any, config: Config, run_dir: Path):
        self._writer = module.SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """The same run again when it is resumed: its id is made of the run directory."""

    def __init__(self, module: Any, config: Config, run_dir: Path):
        self._run = module.init(
            project=config.log.project,
            name=run_dir.name,
            id=hashlib.sha256(str(run_dir).encode()).hexdigest()[:16],
            dir=str(run_dir),
            config=config.model_dump(mode="json"),
            resume="allow",
        )
        self._run.define_metric("*", step_metric="step")  # W&B's own counter takes no step twice, a resumed run does

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log({**values, "step": step})

    def close(self) -> None:
        self._run.finish()


class _Trackio:
    def __init__(self, module: Any, config: Config, run_dir: Path):
        self._run = module.init(
            project=config.log.project,
            name=run_dir.name,
            config=config.model_dump(mode="json"),
            resume="allow",
            embed=False,
        )

    def log(self, values: dict[str, float], step: int) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()


_OPEN: dict[str, Callable[[Any, Config, Path], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "trackio": _Trackio,
}
