"""`python -m opsd.train [config.yaml] [section.key=value ...]`: on-policy self-distillation, start to finish.

The whole flow is `train`, one call per step of it:

    rows -> two prompts -> rollout (student view) -> teacher scores (teacher view) -> student (student view)
         -> objective -> clip, AdamW, teacher update -> log, evaluate, checkpoint
"""

from __future__ import annotations

import argparse
import sys
from functools import partial
from pathlib import Path

from opsd.collector import collector_off

with collector_off():
    import torch

    from opsd.cli import guard, leave, parser, split_words
    from opsd.config import Config, load_config
    from opsd.evaluate import measure
    from opsd.group import Group
    from opsd.metrics import Sums, log_step
    from opsd.opening import open_run
    from opsd.report import write_report
    from opsd.resume import is_run, newest_run, saved_config
    from opsd.run import Run
    from opsd.run_dirs import next_run_dir, run_dirs, with_run_dir
    from opsd.saving import is_best, save, stop_if_asked
    from opsd.step import fitted, learn, passes, sample, teach
    from opsd.stop import Stop, Stopped, on_signals
    from opsd.world import World, joined

AUTO = "auto"


def train(config: Config, resume: bool = False, world: World | None = None, stop: Stop | None = None) -> Run:
    """Train, and return the finished run. Everything a step draws is a function of (seed, step).

    stop: asked, the run makes the update it is at or gives it up, saves, and raises Stopped.
    """
    with open_run(config, resume, world, stop) as run:
        if run.start == 0:
            measure(run, step=0)
        for step in range(run.start, config.train.steps):
            stop_if_asked(run, step)
            torch.manual_seed(run.seed(step, run.world.rank, "dropout"))
            with run.clock.phase("rollout"):
                group = sample(run, run.rows(step), step)
            stop_if_asked(run, step)
            for _ in range(config.objective.updates_per_rollout):
                sums = fitted(run, group, step, gradients)  # the last update's are logged
                with run.clock.phase("student"):
                    sums.add(**run.optimizer.step(step, sums.loss))
                    run.teacher.update(run.optimizer.skipped.last)

            log_step(run, step + 1, sums, group)
            if due(step + 1, config.evaluate.every, config.train.steps):
                measure(run, step + 1)
            if due(step + 1, config.checkpoint.every, config.train.steps) or is_best(run, step + 1):
                save(run, step + 1)
    return run


def gradients(run: Run, group: Group, step: int) -> Sums:
    """Those of one update, pass by pass."""
    sums, parts = Sums(due(step + 1, run.config.log.every, run.config.train.steps)), passes(run, group)
    for part in parts:
        with run.clock.phase("teacher"):
            target = teach(run, part)
        with run.clock.phase("student"), run.model.mode(train=True):  # layers are computed again with their dropout
            loss = learn(run, part, target, sums)
            run.optimizer.backward(loss, step, alone=len(parts) == 1)
    return sums


def due(step: int, every: int, steps: int) -> bool:
    """At multiples of `every`, and always after the last step."""
    return step == steps or (every > 0 and step % every == 0)


def run(args: argparse.Namespace) -> None:
    with on_signals() as stop, joined() as world:
        try:
            with world.in_turn():
                config = _config(args, stop)
            if args.dry_run:
                _dry_run(config, args)
                return
            run_dir, resume = _place(args, config, world)
            finished = train(with_run_dir(config, run_dir), resume, world, stop)
        except Stopped as stopped:
            if world.main:
                print(stopped)
            return
        if world.main:
            write_report(finished.directory)


def _dry_run(config: Config, args: argparse.Namespace) -> None:
    from opsd.plan.command import dry_run  # a run has no use for it

    for part in dry_run(config, args.memory, args.prompt_tokens):
        print(part)


def _config(args: argparse.Namespace, stop: Stop) -> Config:
    file, words = split_words(args.words)
    if args.resume not in (None, AUTO):
        return load_config(file or saved_config(Path(args.resume)), words)
    if file is not None:
        return load_config(file, words)
    # builds data and a cold-started model where they are not cached
    from opsd.affect.embedded import prepare

    try:
        return prepare(words, partial(train, stop=stop))
    except Stopped as stopped:
        raise Stopped("stopped while the job was made; the same command makes it") from stopped


def _place(args: argparse.Namespace, config: Config, world: World) -> tuple[Path, bool]:
    """The run's folder, and whether there is a run in it to go on with; the first process looks."""
    if args.resume not in (None, AUTO):
        return Path(args.resume).absolute(), True
    file, _ = split_words(args.words)
    name, told, old = file.stem if file else "embedded", config.train.run_dir, None
    if args.resume == AUTO and world.main:
        old = newest_run(config, run_dirs(name)) if told is None else told if is_run(told) else None
    run_dir = Path(world.told(str(old or told or next_run_dir(name))))
    return run_dir, world.told("old" if old else "new") == "old"


def main(argv: list[str] | None = None) -> int:
    about = "On-policy self-distillation. Without a config file: the embedded multimodal job."
    made = parser("python -m opsd.train", about)
    made.add_argument(
        "--resume",
        metavar=f"RUN_DIR|{AUTO}",
        help="go on with the run in this folder; auto: with the newest run of this config, or begin one",
    )
    made.add_argument("--dry-run", action="store_true", help="show the first prompts and the memory of a step")
    made.add_argument("--memory", metavar="24GiB", help="of the GPU of the dry run; default: this machine's")
    made.add_argument("--prompt-tokens", type=int, metavar="N", help="dry run: length of the prompts")
    return guard(run, made, argv)


if __name__ == "__main__":
    status = main()
    if "--dry-run" in sys.argv:
        leave(status)
    sys.exit(status)
