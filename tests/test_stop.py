"""A run that is asked to stop saves what it has done and ends well; a second Ctrl-C ends it at once."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import pytest

from opsd import train as loop
from opsd.log import RunDir
from opsd.run_dirs import with_run_dir
from opsd.stop import Stopped, on_signals
from opsd.train import main, train
from tests.jobs import base_words, text_job
from tests.test_resume import assert_same


@pytest.fixture(autouse=True)
def takes_interrupts():
    """As in a terminal: what a shell starts in the background ignores them."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    config = text_job(tmp_path_factory.mktemp("whole"), "log.samples_every=1", "evaluate.every=1")
    train(config)
    return config


def command(config, run_dir: Path) -> list[str]:
    words = [w for w in base_words(Path(config.model.path).parent) if not w.startswith("train.run_dir")]
    return [*words, "log.samples_every=1", "evaluate.every=1", f"train.run_dir={run_dir}"]


def signalled(monkeypatch, name: str, number: int, at: int) -> None:
    """Send ourselves a signal in the `at`-th call of a function of the loop."""
    calls, function = [], getattr(loop, name)

    def call(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), number)
        return function(*args, **kwargs)

    monkeypatch.setattr(loop, name, call)


CASES = {
    "first rollout": ("sample", 1, 0, signal.SIGINT),
    "rollout": ("sample", 2, 1, signal.SIGTERM),
    "teacher": ("teach", 8, 2, signal.SIGINT),
    "student": ("learn", 5, 1, signal.SIGTERM),
    "update and log": ("log_step", 3, 3, signal.SIGINT),
    "evaluation": ("measure", 3, 2, signal.SIGTERM),
    "save": ("save", 1, 2, signal.SIGINT),
}


@pytest.mark.parametrize("where, at, done, number", CASES.values(), ids=CASES.keys())
def test_a_signal_anywhere_saves_and_ends_well_and_the_run_goes_on(
    whole, tmp_path, monkeypatch, capsys, where, at, done, number
):
    run_dir = tmp_path / "run"
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with monkeypatch.context() as patch:
        signalled(patch, where, number, at)
        assert main(_as_file(tmp_path, command(whole, run_dir))) == 0
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert f"stopped after {done} steps; python -m opsd.train --resume {run_dir} goes on" in capsys.readouterr().out
    saved = sorted(path.name for path in (run_dir / "checkpoints").glob("step-*"))
    assert saved[-1:] == [f"step-{done:06d}"] * (done > 0)
    assert [m["step"] for m in RunDir(run_dir).read("metrics")] == list(range(1, done + 1))
    assert main(["--resume", str(run_dir)]) == 0
    assert_same(run_dir, whole.train.run_dir)


def _as_file(folder: Path, words: list[str]) -> list[str]:
    (folder / "job.yaml").write_text("")
    return [str(folder / "job.yaml"), *words]


def test_a_second_ctrl_c_ends_at_once(whole, tmp_path, monkeypatch, capsys):
    signalled(monkeypatch, "teach", signal.SIGTERM, 1)
    signalled(monkeypatch, "learn", signal.SIGINT, 2)
    before = signal.getsignal(signal.SIGINT)
    assert main(_as_file(tmp_path, command(whole, tmp_path / "run"))) == 130
    assert signal.getsignal(signal.SIGINT) == before
    assert "interrupted" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_second_sigterm_changes_nothing_and_ignored_signals_stay_ignored(whole, tmp_path):
    with on_signals() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.asked
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with on_signals() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.asked
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_stop_in_the_library_is_an_exception(whole, tmp_path):
    from opsd.stop import Stop

    stop = Stop()
    stop.asked = True
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    with pytest.raises(Stopped, match="stopped after 0 steps"):
        train(with_run_dir(whole, tmp_path / "run"), stop=stop)
