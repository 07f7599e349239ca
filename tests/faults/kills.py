"""Runs that are killed at random and resumed, again and again, until they are done: what is left equals a whole run.

The parent imports everything once and computes nothing; every attempt is a fork of it that is killed by SIGKILL from
outside, a random time after it has entered a random part of the loop.
"""

from __future__ import annotations

import mmap
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import opsd.rollout
import opsd.train as loop
from opsd import manifest
from opsd.decode import Room, Slots
from opsd.fit import Budget
from opsd.shelf import Shelf
from tests.jobs import base_words, text_job
from tests.test_resume import assert_same

PARTS: dict[str, tuple[Any, str]] = {  # of the loop, and the functions that are them
    "rollout": (loop, "sample"),
    "teacher": (loop, "teach"),
    "student": (loop, "learn"),
    "log": (loop, "log_step"),
    "evaluate": (loop, "measure"),
    "save": (loop, "save"),
    "passes": (Budget, "_write"),  # of passes.json
}
WORDS = ["evaluate.every=2", "log.samples_every=1", "checkpoint.every=1"]
JOBS = {
    "full fine-tuning, EMA teacher": [],
    "rollouts halved, passes found": ["engine.token_budget=auto"],
    "LoRA with dropout, dense EMA teacher": ["model.adapter=lora", "model.lora_dropout=0.1"],
    "frozen teacher, prompts cached on disk": ["teacher.kind=frozen", "engine.teacher_cache=disk"],
    "best kept": ["data.validation={folder}/rows.jsonl", "checkpoint.best=accuracy", "checkpoint.keep=1"],
}
HALVED = {"rollouts halved, passes found": 6}  # responses at a time that there is memory for; a step has 12
PER_RUN = 5  # kills after which a run may finish
LATEST = {"passes": 0.004}  # seconds from entering a part to the kill
LATE = 0.04  # of the other parts


@dataclass
class Figures:
    """What the harness has to say."""

    runs: int = 0
    kills: int = 0
    resumes: int = 0
    equal: int = 0  # runs that equal the whole one: weights and trainer state to the bit, every line of every log
    lost: int = 0  # checkpoints that had their name and were not intact after a kill
    left: int = 0  # temporary files in finished runs
    killed_in: dict[str, int] = field(default_factory=dict)
    unequal: list[str] = field(default_factory=list)


class Watched:
    """What a forked run is doing, in memory shared with its parent: entries of every part, and the one it is in."""

    def __init__(self) -> None:
        self._memory = mmap.mmap(-1, len(PARTS) + 1)

    def clear(self) -> None:
        self._memory[:] = bytes(len(self._memory))

    def entries(self, part: str) -> int:
        return self._memory[1 + list(PARTS).index(part)]

    def now(self) -> str:
        return ["between", *PARTS][self._memory[0]]

    def wrap(self) -> None:
        """In the child: the loop's functions tell."""
        for place, (owner, name) in enumerate(PARTS.values(), start=1):
            setattr(owner, name, self._telling(getattr(owner, name), place))

    def _telling(self, function: Callable[..., Any], place: int) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._memory[place] = min(self._memory[place] + 1, 255)
            around, self._memory[0] = self._memory[0], place
            try:
                return function(*args, **kwargs)
            finally:
                self._memory[0] = around

        return call


def kill_and_resume(folder: Path, kills: int, seed: int) -> Figures:
    """At least `kills` kills, over the jobs in turn."""
    figures, drawn, watched = Figures(), random.Random(seed), Watched()
    whole = {}
    while figures.kills < kills:
        name = list(JOBS)[figures.runs % len(JOBS)]
        if name not in whole:
            whole[name] = folder / f"whole-{len(whole)}"
            assert _wait(_start(folder, name, whole[name], watched)) == 0, "the run that nobody kills"
        run_dir = folder / f"killed-{figures.runs}"
        _one_run(folder, name, run_dir, drawn, figures, watched)
        figures.runs += 1
        try:
            assert_same(run_dir, whole[name])
            assert sorted(map(_name, run_dir.rglob("*"))) == sorted(map(_name, whole[name].rglob("*")))
            assert _passes(run_dir) == _passes(whole[name])
            figures.equal += 1
        except AssertionError as error:
            figures.unequal.append(f"{name}, {run_dir.name}: {str(error)[:300]}")
        figures.left += sum(_is_temporary(path) for path in run_dir.rglob("*"))
    return figures


def _one_run(folder: Path, name: str, run_dir: Path, drawn: random.Random, figures: Figures, watched: Watched) -> None:
    killed = 0
    while True:
        figures.resumes += (run_dir / "config.yaml").exists()
        pid = _start(folder, name, run_dir, watched)
        if killed >= PER_RUN:
            assert _wait(pid) == 0, f"{run_dir} did not go on"
            return
        part, entries = _aim(name, run_dir, drawn)
        status = _kill(pid, part, entries, drawn.uniform(0, LATEST.get(part, LATE)), watched)
        if status is not None:
            assert status == 0, f"{run_dir} ended with {status}"
            return
        killed += 1
        figures.kills += 1
        where = watched.now()
        figures.killed_in[where] = figures.killed_in.get(where, 0) + 1
        shelf = Shelf(run_dir / "checkpoints")
        figures.lost += sum(manifest.damage(shelf.path(step)) is not None for step in shelf.steps())


def _aim(name: str, run_dir: Path, drawn: random.Random) -> tuple[str, int]:
    """A part that the next attempt will enter, and how often it will have done so when it is killed."""
    if name in HALVED and drawn.random() < 0.5:  # every start writes the budget, and the first rollout what it learns
        return "passes", drawn.randint(1, 1 if "slots" in _passes(run_dir) else 2)
    return drawn.choice([part for part in PARTS if part != "passes"]), drawn.randint(1, 2)


def _start(folder: Path, name: str, run_dir: Path, watched: Watched) -> int:
    """A fork that trains, or goes on training."""
    watched.clear()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        log = os.open(folder / f"{run_dir.name}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 2)
        watched.wrap()
        if name in HALVED:
            _fill_up(HALVED[name])
        text_job(folder)  # model and rows, where they are missing
        words = [word for word in base_words(folder) if not word.startswith("train.run_dir")]
        words += [*WORDS, *(word.format(folder=folder) for word in JOBS[name]), f"train.run_dir={run_dir}"]
        words += [f"engine.teacher_cache_dir={run_dir}-cache", "train.steps=3"]
        config = folder / "job.yaml"
        config.touch()
        status = loop.main([str(config), *words, "--resume", "auto"])
    finally:
        os._exit(status)


def _fill_up(most: int) -> None:
    """A device without memory for more responses at a time."""

    def slots(model: Any, room: Room, *others: Any) -> Slots:
        if room.slots > most:
            raise torch.OutOfMemoryError(f"no room for {room.slots} responses")
        return Slots(model, room, *others)

    opsd.rollout.Slots = slots


def _passes(run_dir: Path) -> str:
    """What a run has learnt about its memory."""
    file = run_dir / "passes.json"
    return file.read_text(encoding="utf-8") if file.exists() else ""


def _kill(pid: int, part: str, entries: int, delay: float, watched: Watched) -> int | None:
    """SIGKILL `delay` seconds after a part was entered so often; the exit status of a run that was faster, or None."""
    while watched.entries(part) < entries:
        if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return _wait(pid)
        time.sleep(0.0002)
    time.sleep(delay)
    if os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
        return _wait(pid)
    os.kill(pid, signal.SIGKILL)
    status = _wait(pid)
    return None if status == -signal.SIGKILL else status


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _name(path: Path) -> str:
    return path.name


def _is_temporary(path: Path) -> bool:
    return path.name.startswith(".") or path.suffix in (".tmp", ".old") or path.name.startswith("damaged-")
