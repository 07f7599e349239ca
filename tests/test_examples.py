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
