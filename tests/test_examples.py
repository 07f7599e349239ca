"""What a user copies works: configs load, scripts run, the README's snippets are those that run."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opsd.config import load_config

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("path", sorted((ROOT / "examples").rglob("*.yaml")), ids=lambda path: path.name)
def test_configs_load(path):
    config = load_config(path)
    assert "#" not in (config.prompts.system or ""), "a comment inside a folded text is text"


def run_python(code: list[str], **kwargs) -> str:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join([str(ROOT), str(ROOT / "kernels")]))
    done = subprocess.run([sys.executable, *code], env=env, capture_output=True, text=True, **kwargs)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_plain_loop_runs():
    assert re.search(
        r"JSD per token 0\.\d+, gradient norm [1-9]", run_python([str(ROOT / "examples" / "plain_loop.py")])
    )


def test_the_loss_snippet_of_the_readme_runs():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    snippet = next(
        block for block in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "fused_token_kl" in block
    )
    code = snippet + "\nprint(divergence.shape, divergence.dtype, student_hidden.grad.abs().sum() > 0)"
    assert run_python(["-c", code]).strip() == "torch.Size([512]) torch.float32 tensor(True)"


def test_the_slurm_script_tells_every_process_its_place(tmp_path):
    """Stand-ins for SLURM's commands: two tasks, one after the other, of a python that says what it is told."""
    commands = {
        "scontrol": 'printf "%s\\n" first second',
        "srun": 'while [ "$1" != bash ]; do shift; done; for i in 0 1; do SLURM_PROCID=$i SLURM_LOCALID=$i "$@"; done',
        "python": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT" "$@"',
    }
    for name, text in commands.items():
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"JOB_ID": "31234", "JOB_NAME": "mine", "JOB_NODELIST": "n[1-2]", "SUBMIT_DIR": "/there", "NTASKS": "2"}
    env = {f"SLURM_{name}": value for name, value in (slurm | {"CPUS_PER_TASK": "1"}).items()}
    command = ["bash", str(ROOT / "examples" / "slurm" / "train.sbatch"), "cfg.yaml", "train.steps=3"]
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(command, env=env | {"PATH": path}, capture_output=True, text=True, check=False)
    words = (
        "-m opsd.train cfg.yaml train.parallel=fsdp checkpoint.every=50 train.run_dir=/there/runs/mine train.steps=3"
    )
    told = f"2 first 21234 {words} --resume auto"
    assert done.stdout.splitlines() == [f"0 0 {told}", f"1 1 {told}"], done.stderr
