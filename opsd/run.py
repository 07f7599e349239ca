"""A run: everything `opsd.train` works with, opened and checked before the first step."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from opsd import checkpoint
from opsd.checkpoint import Checkpoint
from opsd.config import Config, dump_config, load_config
from opsd.data import Example, labelled, order, read_examples
from opsd.errors import InputError, explained, raise_all
from opsd.loading import load_model
from opsd.log import Clock, Progress, RunDir, make_progress
from opsd.model import LanguageModel
from opsd.objectives.distill import distill_loss
from opsd.optim import Optimizer
from opsd.parts import what_trains
from opsd.prefix_store import open_store
from opsd.prompt_cache import VIEWS, PromptCache, verify
from opsd.prompts import PromptBuilder, can_teach
from opsd.rollout import Rollouts
from opsd.say import say_once
from opsd.served import ServedRollouts, check_text_only
from opsd.teacher import LiveTeacher, Teacher, build_teacher
from opsd.teacher_cache import TeacherCache
from opsd.world import World

# What a resumed run may change: none of it moves a metric that is compared.
_FREE_TO_CHANGE = (
    *("log.", "checkpoint.", "train.threads", "train.parallel", "train.run_dir"),
    *("engine.teacher_cache_", "media.workers"),
)


@dataclass
class Run:
    """What a run trains with and on, the folder it writes to, and where it stands."""

    train: list[Example]
    held_out: dict[str, list[Example]]  # "test", "validation"
    prompts: PromptCache
    model: LanguageModel
    rollouts: Rollouts | ServedRollouts
    teacher: Teacher
    teacher_cache: TeacherCache | None
    optimizer: Optimizer
    config: Config
    directory: RunDir
    start: int  # updates already done
    logged: int  # the step of the last line in metrics.jsonl
    clock: Clock
    progress: Progress
    world: World
    replaced: int = 0  # rows of this process and step that others stand for

    def rows(self, step: int) -> list[Example]:
        """This process's rows of the step; those of the next one are prepared meanwhile.

        With `data.on_error` skip the next row of the file that decodes stands for one that does not.
        """
        here, after = self._order(step), self._order(step + 1) if step + 1 < self.config.train.steps else []
        views = VIEWS if self.config.objective.kind == "distill" else VIEWS[:1]
        self.prompts.prepare([self.train[row] for row in [*here, *after]], views)
        used = [self._standing_for(row) for row in here] if self.config.data.on_error == "skip" else here
        self.replaced = sum(row != other for row, other in zip(here, used, strict=True))
        return [self.train[row] for row in used]

    def _order(self, step: int) -> list[int]:
        rows = order(len(self.train), self.config.train.prompts_per_step, step, self.config.train.seed)
        return self.world.share(rows)

    def _standing_for(self, row: int) -> int:
        for other in (*range(row, len(self.train)), *range(row)):
            if self.prompts.damage(self.train[other]) is None:
                return other
        raise InputError("a row whose files decode", "none", file=self.config.data.train)

    def seed(self, step: int, place: int, purpose: str) -> int:
        """A 56-bit seed that is a function of (run seed, step, place, purpose): resuming needs no RNG state.

        place: of a row among all of the step, whoever works on it.
        """
        text = f"{self.config.train.seed}/{step}/{place}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")


@contextmanager
def open_run(config: Config, resume: bool = False, world: World | None = None) -> Iterator[Run]:
    """Open a new run, or go on with the one in `train.run_dir`. Every problem is raised before the first step."""
    world = world or World()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    new = config.train.run_dir is not None and not config.train.run_dir.exists()
    with world.in_turn():
        _check_world(config, world)
        directory, last = _open_directory(config, resume, world.main)
    try:
        run = _build(config, directory, last, world)
    except BaseException:
        if new and world.main and not any(directory.path.iterdir()):  # a run that never began leaves no folder
            directory.path.rmdir()
        raise
    with world.in_turn():
        if world.main:
            dump_config(config, directory.path / "config.yaml")  # again on resume: it may train for longer now
            directory.rewind(run.start if last is not None else -1)
    try:
        yield run
    finally:
        run.prompts.close()
        if run.teacher_cache is not None:
            run.teacher_cache.store.flush()
        run.progress.close()


def _check_world(config: Config, world: World) -> None:
    if config.train.prompts_per_step % world.size:
        expected = f"a multiple of the {world.size} processes"
        raise InputError(expected, str(config.train.prompts_per_step), field="train.prompts_per_step")
    if world.size > 1 and config.model.device not in ("auto", "cpu"):
        expected = f"auto or cpu with {world.size} processes, each of which has a device"
        raise InputError(expected, config.model.device, field="model.device")


def _build(config: Config, directory: RunDir, last: Checkpoint | None, world: World) -> Run:
    """Rows, model, teacher and optimizer, each checked; a checkpoint's state is put back."""
    train = _read("train", config)
    held_out = {split: _read(split, config) for split in ("validation", "test") if getattr(config.data, split)}
    check_rows(train, config)
    if config.rollout.server:
        check_text_only(train)
    for split, rows in held_out.items():
        if not any(row.label for row in rows):
            raise InputError("a label on some row", "none", file=getattr(config.data, split), field="label")
    model = load_model(config.model, config.train.seed, last.path if last is not None else None, config.engine)
    if world.size > 1 and config.train.parallel == "fsdp":
        model.divide()
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = PromptCache(builder, config.prompts.cache_mib, config.media.workers)
    if config.prompts.verify:  # what fits stays in the cache
        skip = config.data.on_error == "skip"
        privileged = config.objective.kind == "distill" or config.objective.teacher_view_fraction > 0
        verify(prompts, world.share(train), VIEWS if privileged else VIEWS[:1], skip=skip)
        for rows in map(labelled, held_out.values()):
            taught = config.evaluate.teacher and can_teach(rows, config.prompts)
            verify(prompts, world.share(rows), VIEWS if taught else VIEWS[:1], skip=skip)
    say_once(what_trains(model.module))
    with model.gathered():
        _try_loss(model, config)
    teacher = build_teacher(config.teacher, model) if config.objective.kind == "distill" else LiveTeacher()
    optimizer = Optimizer(model, config.optim, config.train.steps, world)
    start = 0
    if last is not None:
        checkpoint.restore(last, optimizer, teacher)
        start = last.step
    return Run(
        train,
        held_out,
        prompts,
        model,
        _rollouts(config, model, directory, world),
        teacher,
        _teacher_cache(config, model),
        optimizer,
        config,
        directory,
        start=start,
        logged=start,
        clock=Clock(model.device),
        progress=make_progress(config.log.progress if world.main else "none", config.train.steps),
        world=world,
    )


def _rollouts(config: Config, model: LanguageModel, directory: RunDir, world: World) -> Rollouts | ServedRollouts:
    rollout = config.rollout
    if rollout.server and config.objective.kind != "sft":
        return ServedRollouts(model, rollout.server, rollout.server_folder or directory.path / "served", world)
    return Rollouts(model, rollout.slots, rollout.graphs, config.engine.share_prefix)


def save(run: Run, step: int) -> None:
    """A checkpoint after `step` updates."""
    keep = run.config.checkpoint.keep
    state = checkpoint.State.of(run.model, run.optimizer, run.teacher)
    with run.world.in_turn():
        if run.world.main:
            checkpoint.save(run.directory.checkpoints, step, run.model, state, keep)


def next_run_dir(name: str, root: Path = Path("runs")) -> Path:
    """The first free `runs/<name>-NNN`."""
    taken = [int(m[1]) for p in root.glob(f"{name}-*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
    return (root / f"{name}-{max(taken, default=0) + 1:03d}").absolute()


def with_run_dir(config: Config, path: Path) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"run_dir": path})})


def _open_directory(config: Config, resume: bool, writes: bool) -> tuple[RunDir, Checkpoint | None]:
    path = config.train.run_dir
    assert path is not None, "the command line resolves train.run_dir before a run is opened"
    directory = RunDir(path, writes)
    saved = path / "config.yaml"
    if resume:
        if not saved.exists():
            raise InputError("a run directory with config.yaml", "none", file=path, field="--resume")
        same_config(config, load_config(saved), saved)
        last = checkpoint.newest(directory.checkpoints)
        if last is not None and last.step > config.train.steps:
            expected = f"at least the {last.step} steps already done"
            raise InputError(expected, str(config.train.steps), field="train.steps")
        return directory, last
    if path.exists() and not path.is_dir():
        raise InputError("a folder", "a file", file=path, field="train.run_dir")
    if path.exists() and any(path.iterdir()):
        raise InputError(
            "a new or empty folder", "a folder with files", file=path, field="train.run_dir",
            hint="--resume goes on with a run",
        )  # fmt: skip
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError("a folder that can be made", str(error.strerror), file=path, field="train.run_dir") from error
    return directory, None


def same_config(config: Config, saved: Config, file: Path) -> None:
    """Raise InputError where a config is not that of the run it goes on with."""
    now, then = _flat(config), _flat(saved)
    constant = config.optim.schedule == "constant"  # other schedules depend on the number of steps
    free = (*_FREE_TO_CHANGE, "train.steps") if constant else _FREE_TO_CHANGE
    changed = [key for key in now if now[key] != then[key] and not key.startswith(free)]
    raise_all([
        InputError(repr(then[key]), repr(now[key]), file=file, field=key, hint="a resumed run keeps its config")
        for key in changed
    ])  # fmt: skip


def _flat(config: Config) -> dict[str, object]:
    return {f"{s}.{k}": v for s, keys in config.model_dump(mode="json").items() for k, v in keys.items()}


def _teacher_cache(config: Config, model: LanguageModel) -> TeacherCache | None:
    if config.objective.kind != "distill" or not config.engine.share_prefix:
        return None
    store = open_store(config.engine, model.device)
    return TeacherCache(store) if store is not None else None


def _try_loss(model: LanguageModel, config: Config) -> None:
    """One token through the loss: a missing backend or too small a workspace is told now, not after a rollout."""
    if config.objective.kind == "distill":
        weight = model.head.weight
        token = torch.zeros(1, weight.shape[1], dtype=weight.dtype, device=model.device, requires_grad=True)
        with explained("settings that fused_token_kl takes for this model", field="objective"):
            distill_loss(token, model.head, token.detach(), None, torch.ones(1, device=model.device), config.objective)


def _read(split: str, config: Config) -> list[Example]:
    path = getattr(config.data, split)
    if path is None:
        raise InputError("a JSONL file of rows", "nothing", field=f"data.{split}")
    return read_examples(path, config.data, held_out=split != "train")


def check_rows(rows: list[Example], config: Config) -> None:
    """Rows must carry what the objective and the teacher's view will read."""
    objective, needed = config.objective, {}
    if objective.kind == "sft":
        needed["answer"] = "an answer to learn (objective.kind is sft)"
    uses_reward = objective.kind == "reward" or objective.alpha > 0
    if uses_reward and config.rewards.accuracy:
        needed["label"] = "a label to reward (rewards.accuracy is not 0)"
    if objective.kind == "distill" and config.prompts.privilege != "none":
        needed[config.prompts.privilege] = f"a {config.prompts.privilege} (prompts.privilege)"
    raise_all([
        InputError(expected, "nothing", file=row.file, line=row.line, field=field)
        for row in rows
        for field, expected in needed.items()
        if getattr(row, field) is None
    ])  # fmt: skip
