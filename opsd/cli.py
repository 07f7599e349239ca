"""What the commands share: reading arguments, and turning a user's mistake into one line and status 2."""

from __future__ import annotations

import argparse
import errno
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from opsd.errors import InputError
from opsd.say import show

_REFUSED_BY_SYSTEM = {
    *(errno.EACCES, errno.EPERM, errno.EROFS),
    *(errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.ENAMETOOLONG, errno.EIO),
}


def parser(prog: str, description: str) -> argparse.ArgumentParser:
    """A parser of `[config.yaml] [section.key=value ...] [--debug]`; a command adds its own flags."""
    made = argparse.ArgumentParser(prog=prog, description=description, allow_abbrev=False)
    made.add_argument(
        "words",
        nargs="*",
        metavar="config.yaml | section.key=value",
        help="a config and what to change in it",
    )
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return made


def split_words(words: Sequence[str]) -> tuple[Path | None, list[str]]:
    """The config file, if one was named, and the overrides."""
    files = [word for word in words if "=" not in word]
    if len(files) > 1:
        raise InputError(
            "at most one config file",
            ", ".join(files),
            file="command line",
            hint="set a value with section.key=value",
        )
    return (Path(files[0]) if files else None), [word for word in words if "=" in word]


def guard(
    run: Callable[[argparse.Namespace], None],
    made: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> int:
    """Parse `argv`, call `run`, and return the exit status: 0, 2 for a mistake of the user, 130 for Ctrl-C.

    With --debug the exception goes through, traceback and all. Errors that are ours always do.
    """
    args = made.parse_intermixed_args(argv)
    show()
    try:
        run(args)
    except KeyboardInterrupt:
        print(f"{made.prog}: interrupted", file=sys.stderr)
        return 130
    except (InputError, OSError) as error:
        if args.debug or (isinstance(error, OSError) and error.errno not in _REFUSED_BY_SYSTEM):
            raise
        print(f"{made.prog}: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def leave(status: int) -> NoReturn:
    """End the process at once, for a command that has nothing left to close.

    Python would take libraries and model apart first, a million objects: more than a second of an answer of ten.
    """
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:  # the shell may have closed it
            stream.flush()
    os._exit(status)


def _one_line(error: InputError | OSError) -> str:
    if isinstance(error, InputError):
        return str(error)
    path = f"{error.filename}: " if error.filename is not None else ""
    return f"{path}cannot read or write: {error.strerror}"
