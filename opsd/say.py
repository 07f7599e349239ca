"""Choices made for the user, each said once: which kernels compute, and why others do not."""

from __future__ import annotations

import logging
import sys
from contextlib import suppress

_log = logging.getLogger("opsd")
_said: set[str] = set()


def say_once(text: str) -> None:
    """Log a line at INFO, the first time it is said in this process."""
    if text not in _said:
        _said.add(text)
        _log.info(text)


def show() -> None:
    """Let the lines of both packages be seen on stderr: for a command, whose process is ours."""
    for name in ("opsd", "opsd_kernels"):
        logger = logging.getLogger(name)
        if not logger.handlers:
            logger.addHandler(_Stderr())
            logger.setLevel(logging.INFO)


class _Stderr(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError, ValueError):  # a terminal that is full or gone must not end a run
            print(record.getMessage(), file=sys.stderr)
