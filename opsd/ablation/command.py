"""`python -m opsd.ablate`: run the arms one after the other, each a run directory, and write what they came to.

OUT/ARM/             a run of opsd.train; `python -m opsd.train --resume OUT/ARM` would go on with it too
OUT/ablation.json    budget, arms, intervals, hardware and versions
OUT/ablation.md      the table
OUT/ablation.png     curves and bars
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from opsd.ablation.arms import ARMS, split_arms
from opsd.ablation.outcome import is_finished, read_outcome, summary
from opsd.ablation.plot import draw
from opsd.ablation.table import markdown
from opsd.checks import check_rows
from opsd.cli import guard, parser, split_words
from opsd.config import Config, dump_config, load_config
from opsd.data import read_examples
from opsd.environment import environment
from opsd.errors import InputError, writing
from opsd.resume import same_config
from opsd.run_dirs import next_run_dir, with_run_dir

# What reward alone did best with on validation clips (bench/NOTES.md); at the rate of the other arms it collapses.
_EMBEDDED = ("grpo:optim.lr=1e-4", "grpo:objective.updates_per_rollout=2")


def run(args: argparse.Namespace) -> None:
    file, words = split_words(args.words)
    common, own = split_arms(words if file else [*_EMBEDDED, *words])
    out = (args.out or next_run_dir(f"{file.stem if file else 'embedded'}-ablation")).absolute()
    configs = {
        name: with_run_dir(_config(file, [*common, *ARMS[name].words, *own[name]]), out / name)
        for name in ARMS
        if name in args.arms
    }
    _check_rows(configs)
    for config in configs.values():
        _claim(config)
    done = []
    for name, config in configs.items():
        if not is_finished(config):
            print(f"arm {name}: {config.train.run_dir}", flush=True)
            _train(config)
        done.append(read_outcome(ARMS[name], config, own[name]))
        record = summary(done) | {"environment": environment()}
        _write(out / "ablation.json", json.dumps(record, indent=1) + "\n")
        _write(out / "ablation.md", markdown(record, "ablation.png"))
        draw(done, out / "ablation.png")
    print((out / "ablation.md").read_text(encoding="utf-8"))
    print(f"written: {out}/ablation.md, .json, .png")


def _config(file: Path | None, words: Sequence[str]) -> Config:
    if file is not None:
        return load_config(file, words)
    from opsd.affect.embedded import prepare  # builds data and a cold-started model where they are not cached
    from opsd.train import train

    return prepare(words, train)


def _check_rows(configs: dict[str, Config]) -> None:
    """Every arm's rows before the first arm's first step: SFT wants answers, GRPO labels, and so on."""
    first = next(iter(configs.values())).data
    if first.train is None or not (first.test or first.validation):
        raise InputError("data.train, and data.test or data.validation", "nothing", field="data")
    rows = read_examples(first.train, first)
    for name, config in configs.items():
        if config.train.steps:
            try:
                check_rows(rows, config)
            except InputError as problem:
                others = ",".join(other for other in configs if other != name)
                print(f"arm {name} cannot learn from these rows; --arms {others} leaves it out", file=sys.stderr)
                raise problem


def _claim(config: Config) -> None:
    """The arm's folder with its config, which a resumed arm reads: it may have more steps to do now. A folder that is
    there already must be of the same arm, begun before."""
    folder = config.train.run_dir
    assert folder is not None
    saved = folder / "config.yaml"
    if saved.exists():
        same_config(config, load_config(saved), saved)
    elif folder.exists() and any(folder.iterdir()):
        raise InputError("a run directory with config.yaml, or a new folder", "neither", file=folder, field="--out")
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    dump_config(config, saved)


def _train(config: Config) -> None:
    """A process of its own, so that peak memory is the arm's, and another arm's death is nobody else's."""
    command = [sys.executable, "-m", "opsd.train", "--resume", str(config.train.run_dir)]
    status = subprocess.run(command).returncode
    if status == 130:
        raise KeyboardInterrupt
    if status or not is_finished(config):  # one that is asked to stop ends well all the same
        found = f"exit status {status}" if status else "it was stopped"
        raise InputError("the arm to finish", found, file=config.train.run_dir, hint="the same command goes on")


def _write(path: Path, text: str) -> None:
    with writing(path):
        path.write_text(text, encoding="utf-8")


def _arms(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in ARMS:
            raise argparse.ArgumentTypeError(f"expected some of {', '.join(ARMS)}; found {name!r}")
    return names


def main(argv: list[str] | None = None) -> int:
    about = (
        "The paper's comparison on the same rows and budget: the starting student, SFT, GRPO, and OPSD without "
        "rationale, with the label only, and with rationale. Without a config file: the embedded job. A setting of one "
        "arm is written grpo:optim.lr=1e-4. The same command with the same --out goes on after a kill."
    )
    made = parser("python -m opsd.ablate", about)
    made.add_argument("--out", type=Path, metavar="DIR", help="default: the next free runs/<name>-ablation-NNN")
    made.add_argument("--arms", type=_arms, default=list(ARMS), metavar="A,B,...", help=f"of {','.join(ARMS)}")
    return guard(run, made, argv)


if __name__ == "__main__":
    sys.exit(main())
