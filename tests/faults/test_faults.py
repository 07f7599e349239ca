"""The harness in short, and faults of the machine one by one. `python -m tests.faults` does it at length."""

from __future__ import annotations

import ast
import errno
import json
import os
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from opsd import durable
from opsd.shelf import Shelf
from opsd.train import main, train
from tests.faults.malformed import refusals
from tests.jobs import base_words, text_job
from tests.test_resume import assert_same

ROOT = Path(__file__).parents[2]
RUN_CODE = ("torch.load", "eval", "exec", "yaml.load", "yaml.unsafe_load", "yaml.full_load")


def test_killed_runs_equal_whole_ones() -> None:
    """In a process of its own, which imports first and forks before it computes anything."""
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    command = [sys.executable, "-m", "tests.faults", "--kills", "6", "--inputs", "0"]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)["killed_and_resumed"]
    assert found["kills"] >= 6 and found["resumes"] >= 3
    assert found["equal"] == found["runs"] > 0, found["unequal"]
    assert found["lost"] == found["left"] == 0


@pytest.mark.parametrize("kind", ["config", "rows"])
def test_malformed_files_are_refused_with_their_place(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    counts = refusals(kind, 150)
    assert counts["refused"] >= 150 and counts["accepted"] > 0, "some have to be well-formed, or nothing is tried"


def test_nothing_that_is_read_can_run_code() -> None:
    """No pickle, no torch.load, no YAML loader that builds objects, no eval of text.

    The benchmark's own files are pickles: one module reads them, with an unpickler that builds plain values alone, and
    tests/affect/test_unibench_files.py has the files that try more.
    """
    files = [*(ROOT / "opsd").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    for path in files:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            where = f"{path}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.Import | ast.ImportFrom) and path.name != "npz.py":
                names = {alias.name for alias in node.names} | {getattr(node, "module", None)}
                assert not names & {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}, where
            if isinstance(node, ast.Call):
                assert ast.unparse(node.func) not in RUN_CODE, where
                said = {word.arg: ast.unparse(word.value) for word in node.keywords}
                assert said.get("allow_pickle", "False") == "False", where
    assert len(files) > 100


def job(folder: Path, *words: str) -> list[str]:
    text_job(folder)
    (folder / "job.yaml").write_text("")
    return [str(folder / "job.yaml"), *base_words(folder), *words]


def test_a_disk_that_takes_no_more(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A real limit of the system on the size of files, smaller than the trainer's state, once step 2 is saved."""
    words = job(tmp_path, "evaluate.every=2")
    assert main([*words, "train.steps=2"]) == 0
    whole = tmp_path / "whole"
    assert main([*words, f"train.run_dir={whole}"]) == 0
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert main(["--resume", str(tmp_path / "run"), "train.steps=4"]) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    err = capsys.readouterr().err
    assert "File too large" in err and "step-000004" in err and "Traceback" not in err
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(path.name for path in folder.iterdir()) == ["last", "step-000002"], "its room was given back"
    assert main(["--resume", str(tmp_path / "run")]) == 0
    assert_same(tmp_path / "run", whole)


@pytest.mark.parametrize(
    "name, number",
    [
        ("metrics.jsonl", errno.ENOSPC),
        ("trainer.json", errno.EROFS),
        ("manifest.json", errno.EIO),
        ("config.yaml", errno.EROFS),
    ],
)
def test_any_write_that_fails_ends_with_a_message_and_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, number: int
) -> None:
    words = job(tmp_path, "train.steps=1", "checkpoint.every=1")
    assert main(words) == 0
    before = (tmp_path / "run" / "metrics.jsonl").read_text()
    open_path = Path.open

    def refuse(self: Path, mode: str = "r", *args: object, **kwargs: object) -> object:
        if name in self.name and mode[0] in "wa":
            raise OSError(number, os.strerror(number), str(self))
        return open_path(self, mode, *args, **kwargs)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", refuse)
        patch.setattr(Path, "write_text", lambda self, text, encoding=None: _write(self, text))
        assert main(["--resume", str(tmp_path / "run"), "train.steps=2"]) == 2
    err = capsys.readouterr().err
    assert os.strerror(number) in err and name in err and "Traceback" not in err
    assert (tmp_path / "run" / "metrics.jsonl").read_text().startswith(before)
    assert Shelf(tmp_path / "run" / "checkpoints").newest().step == 1
    assert main(["--resume", str(tmp_path / "run"), "train.steps=2"]) == 0
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]


def _write(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)


def test_a_teacher_cache_that_is_deleted_mid_run_costs_nothing_but_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["teacher.kind=frozen", "engine.teacher_cache=disk", "engine.teacher_cache_host_mib=0"]
    whole = text_job(tmp_path, *words, f"engine.teacher_cache_dir={tmp_path / 'a'}", "log.samples_every=1")
    train(whole)
    assert list((tmp_path / "a").glob("prefix-*"))
    cut = text_job(
        tmp_path, *words, f"engine.teacher_cache_dir={tmp_path / 'b'}", "log.samples_every=1",
        f"train.run_dir={tmp_path / 'cut'}",
    )  # fmt: skip
    deleted = []

    def delete(run: object, group: object) -> object:
        if len(deleted) < 3:
            deleted.append((tmp_path / "b").exists())
            shutil.rmtree(tmp_path / "b", ignore_errors=True)
        return teach(run, group)  # type: ignore[arg-type]

    from opsd import train as loop

    teach = loop.teach
    monkeypatch.setattr(loop, "teach", delete)
    train(cut)
    assert deleted == [True] * 3, "it is made again"
    assert_same(tmp_path / "cut", whole.train.run_dir)


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = [
        "teacher.kind=frozen",
        "engine.teacher_cache=disk",
        "engine.teacher_cache_disk_mib=1",
        "log.samples_every=1",
    ]
    whole = text_job(tmp_path, *words, f"engine.teacher_cache_dir={tmp_path / 'a'}")
    train(whole)
    now = [2**60]

    def earlier() -> int:
        now[0] -= 10**12
        return now[0]

    monkeypatch.setattr(time, "time_ns", earlier)
    monkeypatch.setattr(time, "time", lambda: earlier() / 1e9)
    back = text_job(
        tmp_path, *words, f"engine.teacher_cache_dir={tmp_path / 'b'}", f"train.run_dir={tmp_path / 'back'}"
    )
    train(back)
    assert_same(tmp_path / "back", whole.train.run_dir)


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    durable.write_text(path, "before")

    def fail(descriptor: int) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="error") as caught:
        durable.write_text(path, "after")
    assert caught.value.filename == str(path)
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]
