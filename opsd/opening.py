"""A run is opened: its folder is this process's, everything in it is built and checked before the first step."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from opsd import checkpoint, trackers
from opsd.checks import check_data, check_loss, check_prompts, check_world
from opsd.config import Config, dump_config
from opsd.data import Example, digest, read_examples
from opsd.errors import InputError
from opsd.fit import Budget, learnt
from opsd.heap import keep_freed_memory
from opsd.in_backward import InBackward
from opsd.loading import load_model
from opsd.log import Clock, RunDir
from opsd.model import LanguageModel
from opsd.optim import Optimizer
from opsd.parts import what_trains
from opsd.plan.start import fitting_budget
from opsd.prefix_store import open_store
from opsd.progress import make_progress
from opsd.prompt_cache import PromptCache
from opsd.prompts import PromptBuilder
from opsd.resume import alone, open_directory, start_from
from opsd.rollout import Rollouts
from opsd.run import Run
from opsd.sampling import Sampling
from opsd.say import say_once
from opsd.served import ServedRollouts
from opsd.shelf import Shelf
from opsd.stop import Stop
from opsd.teacher import LiveTeacher, build_teacher
from opsd.teacher_cache import TeacherCache
from opsd.world import World
from opsd_kernels.memory import keep_workspace


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
        check_world(config, world)
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
    if run.config.engine.token_budget == "auto":
        run.budget.keep()  # beside a config alone: without one the folder would be no run's, and not empty
    run.directory.rewind(run.start or -1)  # without a checkpoint the run starts over
    shelf = Shelf(run.directory.checkpoints)
    shelf.set_aside(run.start)
    shelf.tidy(run.config.checkpoint)


def _build(config: Config, directory: RunDir, resume: bool, world: World) -> Run:
    """Rows, model, teacher and optimizer, each checked; a checkpoint's state is put back."""
    train = _read("train", config)
    data = digest(train)
    last = start_from(config, directory, data, world) if resume else None
    held_out = {split: _read(split, config) for split in ("validation", "test") if getattr(config.data, split)}
    check_data(train, held_out, config)
    model = load_model(config.model, config.train.seed, last.path if last is not None else None, config.engine)
    if model.device.type == "cpu":
        keep_freed_memory(sum(p.nbytes for p in model.module.parameters()))
        keep_workspace(False)  # a run has been planned to its resident bytes, and calls once a pass
    if world.size > 1 and config.train.parallel == "fsdp":
        model.divide()
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = PromptCache(builder, config.prompts.cache_mib, config.media.workers)
    if config.prompts.verify:
        check_prompts(prompts, train, held_out, config, world)
    say_once(what_trains(model.module))
    with model.gathered():
        check_loss(model, config)
    teacher = build_teacher(config.teacher, model) if config.objective.kind == "distill" else LiveTeacher()
    kind = InBackward if config.optim.in_backward else Optimizer
    optimizer = kind(model, config.optim, config.train.steps, world)
    if last is not None:
        checkpoint.restore(last, optimizer, teacher)
    start = last.step if last is not None else 0
    budget = _budget(config, directory, model, train, prompts, world)
    rollouts = _rollouts(config, model, directory, world, budget)
    if isinstance(rollouts, ServedRollouts):
        rollouts.check(prompts.student(train[0]), Sampling.of(config.rollout))
    return Run(
        train,
        held_out,
        prompts,
        model,
        rollouts,
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
    known = world.told("yes" if "token_budget" in learnt(file) else "no")  # to the first process, for all of them
    if tokens == "auto" and known == "no":
        rows = prompts.whole(train) if config.data.on_error == "skip" else train
        tokens = int(world.told(str(fitting_budget(config, model, rows, prompts, world.size))))
    most = sys.maxsize if tokens == "auto" else tokens
    with world.in_turn():
        budget = Budget.of(most, file) if world.main else Budget(most, file, writes=False)
    budget.tokens = int(world.told(str(budget.tokens)))
    budget.slots = int(world.told(str(budget.slots)))
    budget.prompt_tokens = int(world.told(str(budget.prompt_tokens)))
    return budget


def _read(split: str, config: Config) -> list[Example]:
    path = getattr(config.data, split)
    if path is None:
        raise InputError("a JSONL file of rows", "nothing", field=f"data.{split}")
    return read_examples(path, config.data, held_out=split != "train")
