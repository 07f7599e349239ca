"""Exit status and message of a command, for mistakes of the user and for everything else."""

from __future__ import annotations

import argparse
import errno
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from opsd.cli import guard, parser, split_words
from opsd.errors import InputError, writing


def status(error: BaseException | None, *argv: str) -> int:
    def run(args: argparse.Namespace) -> None:
        if error is not None:
            raise error

    return guard(run, parser("opsd.train", "Trains."), argv)


MISTAKE = InputError(
    "one of happy, sad", "'hapy'", file="rows.jsonl", line=12, field="label", hint="did you mean 'happy'?"
)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (
            None,
            0,
            "",
        ),
        (
            MISTAKE,
            2,
            "opsd.train: rows.jsonl:12: field 'label': expected one of happy, sad; found 'hapy' "
            "(did you mean 'happy'?)\n",
        ),
        (
            PermissionError(errno.EACCES, "Permission denied", "runs/a"),
            2,
            "opsd.train: runs/a: cannot read or write: Permission denied\n",
        ),
        (
            OSError(errno.ENOSPC, "No space left on device"),
            2,
            "opsd.train: cannot read or write: No space left on device\n",
        ),
        (
            KeyboardInterrupt(),
            130,
            "opsd.train: interrupted\n",
        ),
    ],
)
def test_exit_status_and_one_line(
    error: BaseException | None, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert status(error) == code
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("error", [MISTAKE, PermissionError(errno.EACCES, "Permission denied")])
def test_debug_shows_the_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        status(error, "--debug")


@pytest.mark.parametrize("error", [RuntimeError("ours"), FileNotFoundError(errno.ENOENT, "gone")])
def test_our_own_mistakes_are_never_hidden(error: Exception) -> None:
    with pytest.raises(type(error)):
        status(error)


def test_words_may_come_in_any_order_among_flags() -> None:
    seen: list[argparse.Namespace] = []
    made = parser("opsd.train", "Trains.")
    made.add_argument("--resume", type=Path)
    assert guard(seen.append, made, ["optim.lr=1", "--resume", "runs/a", "job.yaml", "--debug", "a.b=c=d"]) == 0
    assert split_words(seen[0].words) == (Path("job.yaml"), ["optim.lr=1", "a.b=c=d"])
    assert seen[0].resume == Path("runs/a")
    assert split_words([]) == (None, [])


def test_two_config_files_are_one_too_many() -> None:
    with pytest.raises(InputError, match=r"command line: expected at most one config file; found a\.yaml, lr "):
        split_words(["a.yaml", "lr"])


@pytest.mark.parametrize(
    "failure", [lambda: OSError(errno.ENOSPC, "full"), lambda: RuntimeError("I/O error: full (os error 28)")]
)
def test_a_failed_write_names_its_file(failure: Callable[[], Exception]) -> None:
    with pytest.raises(OSError, match=r"model\.safetensors") as caught, writing("runs/a/model.safetensors"):
        raise failure()
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, "runs/a/model.safetensors")


def test_writing_leaves_other_errors_alone() -> None:
    with pytest.raises(OSError, match="there") as caught, writing("here"):
        raise OSError(errno.EACCES, "Permission denied", "there")
    assert caught.value.filename == "there"
    with pytest.raises(RuntimeError, match="ours"), writing("here"):
        raise RuntimeError("ours")


def test_leaving_loses_nothing_that_was_printed() -> None:
    code = "import sys; from opsd.cli import leave; print('answer'); print('why', file=sys.stderr); leave(3)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (3, "answer\n", "why\n")
    for closed in (">&-", "2>&-", ">&- 2>&-"):
        done = subprocess.run(["sh", "-c", f'"$0" -c "$1" {closed}', sys.executable, code], check=False)
        assert done.returncode == 3
