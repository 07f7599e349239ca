"""`python -m bench.embedded_step OTHER NAME.json`: a step of the embedded job, here and in another checkout, in turn.

OTHER is a source tree of this project, its C++ rows built where it should have them. Both trees train the same
cold-started model on the same rows, each as its own opsd/affect/embedded.yaml says; of a video they see one frame, for
trees that cannot read videos. The first line of a run, which warms up, does not count. Rounds are added to those that
NAME.json has for the same overrides.

Seconds are those of the processor: the job computes on one thread, and what else the machine does disturbs them less.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from PIL import Image

from opsd.affect.embedded import prepare
from opsd.environment import environment
from opsd.media import load_video
from opsd.train import train

HERE = Path(__file__).parents[1]
STEPS, LINES, ROWS, HELD_OUT = 20, 5, 160, 16
PHASES = ("rollout", "teacher", "student")
TRAIN = "import time; time.perf_counter = time.process_time; from opsd.train import main; main()"
Times = dict[str, float]


def run(tree: Path, data: dict[str, str], words: list[str]) -> Times:
    """Seconds of one step in a fresh process, median over the logged lines: whole, and of its phases."""
    with TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        settings = {**data, "train.steps": STEPS, "log.every": LINES, "log.progress": "none", "train.run_dir": run_dir}
        command = [sys.executable, "-c", TRAIN, "opsd/affect/embedded.yaml", *words]
        command += [f"{key}={value}" for key, value in settings.items()]
        env = {**os.environ, "PYTHONPATH": f"{tree}:{tree / 'kernels'}"}
        subprocess.run(command, cwd=tree, env=env, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()[1:]]
    tokens = 16 * 2  # responses of a step; a speed is response tokens per second of a phase
    times = {p: [tokens * line["response_length"] / line[f"{p}_tokens_per_second"] for line in lines] for p in PHASES}
    times["step"] = [line["seconds"] for line in lines]
    return {name: statistics.median(found) for name, found in times.items()}


def common(folder: Path) -> dict[str, str]:
    """Model and rows of this tree's embedded job that both trees can read. folder: for pictures."""
    config = prepare([], train)
    paths = {"data.train": (config.data.train, ROWS), "data.test": (config.data.test, HELD_OUT)}
    settings = {"model.path": config.model.path}
    for field, (source, count) in paths.items():
        assert source is not None
        rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()[:count]]
        for part in (part for row in rows for message in row["prompt"] for part in message["content"]):
            if part["type"] == "video":
                picture = folder / f"{Path(part['video']).stem}.png"
                Image.fromarray(load_video(source.parent / part["video"], 1).frames[0]).save(picture)
                part.clear()
                part.update(type="image", image=str(picture))
        target = source.with_name(f".{field}-{folder.name}.jsonl")  # media are named from the folder of the rows
        target.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        settings[field] = str(target)
    return settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("other", type=Path, help="the other source tree")
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--words", nargs="*", default=[], help="overrides of the config here")
    args = parser.parse_args()
    trees = {"here": (HERE, args.words), "other": (args.other.absolute(), [])}
    before = json.loads(args.out.read_text()) if args.out.exists() else {}
    rounds: list[dict[str, Times]] = before["rounds"] if before.get("words") == args.words else []
    with TemporaryDirectory() as folder:
        data = common(Path(folder))
        try:
            for _ in range(args.rounds):
                rounds.append({name: run(tree, data, words) for name, (tree, words) in trees.items()})
                print({name: round(times["step"], 4) for name, times in rounds[-1].items()}, flush=True)
        finally:
            for field in ("data.train", "data.test"):
                Path(data[field]).unlink()
    args.out.write_text(json.dumps({**environment(), "words": args.words, **summary(rounds)}, indent=1) + "\n")


def summary(rounds: list[dict[str, Times]]) -> dict[str, Any]:
    """Medians over the rounds, and how many times as long the other tree takes: by median, best and round."""
    both: list[list[float]] = [[one[name]["step"] for one in rounds] for name in ("here", "other")]
    return {
        "seconds": {
            name: {part: statistics.median(one[name][part] for one in rounds) for part in (*PHASES, "step")}
            for name in ("here", "other")
        },
        "ratio": statistics.median(both[1]) / statistics.median(both[0]),
        "best_ratio": min(both[1]) / min(both[0]),
        "ratios": [round(b / a, 3) for a, b in zip(*both, strict=True)],
        "rounds": rounds,
    }


if __name__ == "__main__":
    main()
