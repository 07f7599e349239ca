"""A run: everything `opsd.train` works with, opened and checked before the first step."""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch

from opsd import checkpoint, trackers
from opsd.config import Config, dump_config
from opsd.data import Example, digest, labelled, order, read_examples
from opsd.errors import InputError, explained, raise_all
from opsd.fit import Budget, learnt
from opsd.heap import keep_freed_memory
from opsd.in_backward import InBackward
from opsd.loading import load_model
from opsd.log import Clock, RunDir
from opsd.model import LanguageModel
from opsd.objectives.distill import distill_loss
from opsd.optim import Optimizer
from opsd.parts import what_trains
from opsd.plan.start import fitting_budget
from opsd.prefix_store import open_store
from opsd.progress import Progress, make_progress
from opsd.prompt_cache import VIEWS, PromptCache, verify
from opsd.prompts import PromptBuilder, can_teach
from opsd.resume import alone, open_directory, start_from
from opsd.rollout import Rollouts
from opsd.say import say_once
from opsd.served import ServedRollouts, check_text_only
from opsd.shelf import Shelf
from opsd.stop import Stop
from opsd.teacher import LiveTeacher, Teacher, build_teacher
from opsd.teacher_cache import TeacherCache
from opsd.world import World
from opsd_kernels.memory import keep_workspace


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
    data: str  # digest of the training rows
    start: int  # steps already done
    logged: int  # the step of the last line in metrics.jsonl
    saved: int  # the step of the last checkpoint
    clock: Clock
    progress: Progress
    world: World
    stop: Stop
    budget: Budget
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
def open_run(
    config: Config, resume: bool = False, world: World | None = None, stop: Stop | None = None
) -> Iterator[Run]:
    """Open a new run, or go on with the one in `train.run_dir`. Every problem is raised before the first step."""
    world = world or World()
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    new = config.train.run_dir is not None and not config.train.run_dir.exists()
    with world.in_turn():
        _check_world(config, world)
        trackers.find(config)
        directory = open_directory(config, resume, world.main)
    with alone(directory.path) if world.main else nullcontext():
        try:
            run = _build(config, directory, resume, world)
        except BaseException:
            if new and world.main and not any(directory.path.iterdir()):  # a run that never began leaves no folder
                directory.path.rmdir()
            raise
        run.stop = stop or run.stop
        with world.in_turn():
            if world.main:
                _begin(run)
        try:
            with trackers.listening(config, directory) if world.main else nullcontext():
                yield run
        finally:
            run.prompts.close()
            run.progress.close()


def _begin(run: Run) -> None:
    """What the folder holds is made what the run goes on from: nothing of steps that will be done again."""
    dump_config(run.config, run.directory.path / "config.yaml")  # again on resume: it may train for longer now
    run.directory.rewind(run.start or -1)  # without a checkpoint the run starts over
    shelf = Shelf(run.directory.checkpoints)
    shelf.set_aside(run.start)
    shelf.tidy(run.config.checkpoint)


def _check_world(config: Config, world: World) -> None:
    if config.train.prompts_per_step % world.size:
        expected = f"a multiple of the {world.size} processes"
        raise InputError(expected, str(config.train.prompts_per_step), field="train.prompts_per_step")
    if world.size > 1 and config.model.device not in ("auto", "cpu"):
        expected = f"auto or cpu with {world.size} processes, each of which has a device"
        raise InputError(expected, config.model.device, field="model.device")
    if world.size > 1 and config.optim.in_backward:
        expected = f"false with {world.size} processes, whose gradients are added up when all are whole"
        raise InputError(expected, "true", field="optim.in_backward")


def _build(config: Config, directory: RunDir, resume: bool, world: World) -> Run:
    """Rows, model, teacher and optimizer, each checked; a checkpoint's state is put back."""
    train = _read("train", config)
    data = digest(train)
    last = start_from(config, directory, data, world) if resume else None
    held_out = {split: _read(split, config) for split in ("validation", "test") if getattr(config.data, split)}
    check_rows(train, config)
    if config.rollout.server:
        check_text_only(train)
    if config.checkpoint.best == "loss":
        check_rows(labelled(held_out["validation"]), config)
    for split, rows in held_out.items():
        if not any(row.label for row in rows):
            raise InputError("a label on some row", "none", file=getattr(config.data, split), field="label")
    model = load_model(config.model, config.train.seed, last.path if last is not None else None, config.engine)
    if model.device.type == "cpu":
        keep_freed_memory(sum(p.nbytes for p in model.module.parameters()))
        keep_workspace(False)  # a run has been planned to its resident bytes, and calls once a pass
    if world.size > 1 and config.train.parallel == "fsdp":
        model.divide()
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = PromptCache(builder, config.prompts.cache_mib, config.media.workers)
    if config.prompts.verify:  # what fits stays in the cache
        skip = config.data.on_error == "skip"
        privileged = config.objective.kind == "distill" or config.objective.teacher_view_fraction > 0
        verify(prompts, world.share(train), VIEWS if privileged else VIEWS[:1], skip=skip)
        measured = config.evaluate.teacher or config.checkpoint.best == "loss"
        for rows in map(labelled, held_out.values()):
            taught = measured and can_teach(rows, config.prompts)
            verify(prompts, world.share(rows), VIEWS if taught else VIEWS[:1], skip=skip)
    say_once(what_trains(model.module))
    with model.gathered():
        _try_loss(model, config)
    teacher = build_teacher(config.teacher, model) if config.objective.kind == "distill" else LiveTeacher()
    kind = InBackward if config.optim.in_backward else Optimizer
    optimizer = kind(model, config.optim, config.train.steps, world)
    if last is not None:
        checkpoint.restore(last, optimizer, teacher)
    start = last.step if last is not None else 0
    budget = _budget(config, directory, model, train, prompts, world)
    return Run(
        train,
        held_out,
        prompts,
        model,
        _rollouts(config, model, directory, world, budget),
        teacher,
        _teacher_cache(config, model),
        optimizer,
        config,
        directory,
        data,
        start=start,
        logged=start,
        saved=start,
        clock=Clock(model.device),
        progress=make_progress(config.log.progress if world.main else "none", config.train.steps),
        world=world,
        stop=Stop(),
        budget=budget,
    )


def _rollouts(
    config: Config, model: LanguageModel, directory: RunDir, world: World, budget: Budget
) -> Rollouts | ServedRollouts:
    rollout = config.rollout
    if rollout.server and config.objective.kind != "sft":
        digest = hashlib.sha256(str(directory.path).encode()).hexdigest()[:8]
        name, folder = f"opsd-{directory.path.name}-{digest}", rollout.server_folder or directory.path / "served"
        return ServedRollouts(model, rollout.server, folder, name, world)
    return Rollouts(model, rollout.slots, rollout.graphs, config.engine.share_prefix, budget)


def run_dirs(name: str, root: Path = Path("runs")) -> list[Path]:
    """Every `runs/<name>-NNN` there is, in the order of their numbers."""
    named = [(int(m[1]), p) for p in root.glob("*") if (m := re.fullmatch(rf"{re.escape(name)}-(\d+)", p.name))]
    return [path.absolute() for _, path in sorted(named)]


def next_run_dir(name: str, root: Path = Path("runs")) -> Path:
    """The first free `runs/<name>-NNN`."""
    last = next((int(path.name.rpartition("-")[2]) for path in reversed(run_dirs(name, root))), 0)
    return (root / f"{name}-{last + 1:03d}").absolute()


def with_run_dir(config: Config, path: Path) -> Config:
    return config.model_copy(update={"train": config.train.model_copy(update={"run_dir": path})})


def _teacher_cache(config: Config, model: LanguageModel) -> TeacherCache | None:
    if config.objective.kind != "distill" or not config.engine.share_prefix:
        return None
    store = open_store(config.engine, model.device)
    return TeacherCache(store) if store is not None else None


def _budget(
    config: Config, directory: RunDir, model: LanguageModel, train: list[Example], prompts: PromptCache, world: World
) -> Budget:
    """Tokens of a pass: the config's, or as many as fit; fewer where the run has learnt so."""
    tokens, file = config.engine.token_budget, directory.path / "passes.json"
    knows = (
        world.told("yes" if "token_budget" in learnt(file) else "no") == "yes"
    )  # the first process', for all of them
    if tokens == "auto" and not knows:
        rows = prompts.whole(train) if config.data.on_error == "skip" else train
        tokens = int(world.told(str(fitting_budget(config, model, rows, prompts, world.size))))
    most = sys.maxsize if tokens == "auto" else tokens
    with world.in_turn():
        budget = Budget.of(most, file) if world.main else Budget(most, file, writes=False)
    budget.tokens = int(world.told(str(budget.tokens)))
    budget.slots = int(world.told(str(budget.slots)))
    budget.prompt_tokens = int(world.told(str(budget.prompt_tokens)))
    if config.engine.token_budget == "auto":
        budget.keep()
    return budget


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
