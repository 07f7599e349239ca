"""`python -m bench.embedded_job NAME.json`: three seeds of the embedded job, one after the other.

Each line of RUNS is a command of the README; `python -m opsd.ablate` has the comparisons. The file is written after
every run.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opsd.environment import environment

RUNS = {
    "opsd seed 0": "train.seed=0",
    "opsd seed 1": "train.seed=1",
    "opsd seed 2": "train.seed=2",
}
SPEEDS = ("seconds", "rollout_tokens_per_second", "teacher_tokens_per_second", "student_tokens_per_second")


def measure(name: str, words: str, folder: Path) -> dict[str, Any]:
    """Evaluations of one run, and medians of its speeds."""
    run_dir = folder / name.replace(" ", "-").replace(",", "")
    command = ["-m", "opsd.train", *words.split()]
    quiet = ["log.progress=none", f"train.run_dir={run_dir}"]
    subprocess.run([sys.executable, *command, *quiet], check=True, stdout=subprocess.DEVNULL)
    lines = {file: (run_dir / f"{file}.jsonl").read_text().splitlines() for file in ("evaluations", "metrics")}
    metrics = [json.loads(line) for line in lines["metrics"]]
    return {
        "run": name,
        "command": "python " + " ".join(command),
        "evaluations": [json.loads(line) for line in lines["evaluations"]],
        "step": {key: statistics.median(m[key] for m in metrics) for key in SPEEDS if key in metrics[-1]},
        "saved_tokens": metrics[-1]["saved_tokens"],
    }


def main() -> None:
    out = Path(sys.argv[1])
    runs: list[dict[str, Any]] = []
    with TemporaryDirectory() as folder:
        for name, words in RUNS.items():
            runs.append(measure(name, words, Path(folder)))
            out.write_text(json.dumps({**environment(), "runs": runs}, indent=1) + "\n")
            first, last = ([e["accuracy"] for e in runs[-1]["evaluations"]][i] for i in (0, -2))
            print(f"{name}: {first:.1%} -> {last:.1%}", flush=True)


if __name__ == "__main__":
    main()
