"""Every command of docs/ is run, page by page, in a folder with a small model where the reader's would be."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from opsd.affect.embedded import vocabulary
from opsd.affect.tiny import TinySize, build
from tests.jobs import write_rows
from tests.models import save_text_model

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
BLOCK = re.compile(r"^(?:<!-- (.+?) -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

JOB = """
model: {path: model}
data: {train: words.jsonl, test: words.jsonl}
train: {steps: 2, prompts_per_step: 2, threads: 1}
rollout: {group_size: 2, max_new_tokens: 8}
log: {progress: none}
"""


def blocks(page: Path) -> list[tuple[str, str, str]]:
    """(what the comment before it says, language, text) of every block of code."""
    return [(said or "", language, text) for said, language, text in BLOCK.findall(page.read_text(encoding="utf-8"))]


@pytest.fixture
def place(tmp_path, python):
    """What a reader has around: the examples, a model, rows; `.venv/bin/python`, `python` and `torchrun`."""
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    save_text_model(tmp_path / "model")
    write_rows(tmp_path / "words.jsonl")
    (tmp_path / "job.yaml").write_text(JOB)
    for folder in (tmp_path / ".venv" / "bin", tmp_path / "bin"):
        folder.mkdir(parents=True)
        for name, module in {"python": "", "torchrun": " -m torch.distributed.run --standalone"}.items():
            script = folder / name
            script.write_text(f'#!/bin/sh\nexec "{python}"{module} "$@"\n')
            script.chmod(0o755)
    return tmp_path


def run(place: Path, command: list[str]) -> None:
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": f"{place / 'bin'}:{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"


@pytest.mark.parametrize("page", [page for page in PAGES if "<!-- run -->" in page.read_text()], ids=lambda p: p.stem)
def test_the_commands_of_a_page_run(place, page):
    if page.stem == "quickstart":  # its first command, the embedded job, leaves this
        torch.manual_seed(0)
        build(place / "runs/cache/embedded-0/model", vocabulary(), TinySize(), 0)
    shell = []
    for said, language, text in blocks(page):
        if said.startswith("file: "):
            file = place / said.removeprefix("file: ")
            file.parent.mkdir(exist_ok=True)
            file.write_text(text)
        elif said == "run" and language == "python":
            run(place, ["python", "-c", text])
        elif said == "run":
            shell.append(text)  # one shell a page: a later block may use a variable of an earlier one
    if shell:
        run(place, ["bash", "-euo", "pipefail", "-c", "\n".join(shell)])


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["python", "-c", "import sys; sys.exit(3)"], ""),
        (["python", "-c", "import os; os.abort()"], ""),
        (["python", "-m", "opsd.train", "no.yaml"], "no.yaml"),
        (["python", "examples/quickstart/rows.py"], "IndexError"),
        (["bash", "-ec", "python -c 'raise KeyError(7)'; true"], "KeyError: 7"),
    ],
)
def test_a_command_that_fails_is_noticed(place, words, said):
    with pytest.raises(AssertionError, match=said):
        run(place, words)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_no_command_goes_unsaid(page):
    for said, language, text in blocks(page):
        if language in ("bash", "python"):
            assert said == "run" or said.startswith("not run here: "), text


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_messages_of_the_page_of_errors_are_ours():
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "opsd").rglob("*.py"))
    rows = re.findall(r"^\| `(.+?)` \|", (ROOT / "docs" / "errors.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert len(rows) >= 10
    for message in rows:
        known = message.removeprefix("expected ").removesuffix(" tensorboard")
        assert known in source, message


def test_the_quickstart_is_ten_commands_at_most():
    text = "\n".join(text for _, language, text in blocks(ROOT / "docs" / "quickstart.md") if language == "bash")
    commands = [line for line in text.splitlines() if line and not line.startswith("MODEL=")]
    assert len(commands) <= 10
