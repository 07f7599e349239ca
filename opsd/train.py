"""`python -m opsd.train [config.yaml] [section.key=value ...]`: on-policy self-distillation, start to finish.

The whole flow is `train`, one call per step of it:

    rows -> two prompts -> rollout (student view) -> teacher scores (teacher view) -> student (student view)
         -> objective -> clip, AdamW, teacher update -> log, evaluate, checkpoint
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from opsd.cli import guard, parser, split_words
from opsd.config import Config, load_config
from opsd.errors import InputError
from opsd.evaluate import measure
from opsd.metrics import Sums, log_step
from opsd.report import write_report
from opsd.run import Run, next_run_dir, open_run, save, with_run_dir
from opsd.step import learn, passes, sample, teach
from opsd.world import World, joined


def train(config: Config, resume: bool = False, world: World | None = None) -> Run:
    """Train, and return the finished run. Everything a step draws is a function of (seed, step)."""
    with open_run(config, resume, world) as run:
        if run.start == 0:
            measure(run, step=0)
        for step in range(run.start, config.train.steps):
            torch.manual_seed(run.seed(step, run.world.rank, "dropout"))
            with run.clock.phase("rollout"):
                group = sample(run, run.rows(step), step)
            for _ in range(config.objective.updates_per_rollout):
                sums = Sums()  # the last update's are logged
                for part in passes(run, group):
                    with run.clock.phase("teacher"):
                        target = teach(run, part)
                    with run.clock.phase("student"):
                        loss = learn(run, part, target, sums)
                        loss.backward()
                with run.clock.phase("student"):
                    sums.add(**run.optimizer.step(step))
                    run.teacher.update()

            log_step(run, step + 1, sums, group)
            if due(step + 1, config.evaluate.every, config.train.steps):
                measure(run, step + 1)
            if due(step + 1, config.checkpoint.every, config.train.steps):
                save(run, step + 1)
    return run


def due(step: int, every: int, steps: int) -> bool:
    """At multiples of `every`, and always after the last step."""
    return step == steps or (every > 0 and step % every == 0)


def run(args: argparse.Namespace) -> None:
    with joined() as world:
        with world.in_turn():
            config = _config(args)
        if config.train.run_dir is None:
            file, _ = split_words(args.words)
            name = file.stem if file else "embedded"
            config = with_run_dir(config, Path(world.told(str(next_run_dir(name)))))
        finished = train(config, args.resume is not None, world)
        if world.main:
            write_report(finished.directory)


def _config(args: argparse.Namespace) -> Config:
    file, words = split_words(args.words)
    if args.resume is not None:
        return _resumed(args.resume, file, words)
    if file is None:
        # builds data and a cold-started model where they are not cached
        from opsd.affect.embedded import prepare

        return prepare(words, train)
    return load_config(file, words)


def _resumed(run_dir: Path, file: Path | None, words: list[str]) -> Config:
    """The config of an interrupted run: its own, or a given file that must say the same."""
    saved = run_dir / "config.yaml"
    if not saved.exists():
        raise InputError("a run directory with config.yaml", "none", file=run_dir, field="--resume")
    return with_run_dir(load_config(file or saved, words), run_dir.absolute())


def main(argv: list[str] | None = None) -> int:
    about = "On-policy self-distillation. Without a config file: the embedded multimodal job."
    made = parser("python -m opsd.train", about)
    made.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with the run in this folder")
    return guard(run, made, argv)


if __name__ == "__main__":
    sys.exit(main())
