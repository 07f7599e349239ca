"""SIGTERM and SIGINT ask a run to stop: it finishes or gives up the step it is in, saves, and ends well.

A second SIGINT ends it at once, as Ctrl-C does elsewhere; a third ends even a process that does not listen. Signals are
taken by the command alone: in a notebook, Ctrl-C is the notebook's.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

_SAID = b"\nstopping: the step is finished or given up, and saved (Ctrl-C again: at once)\n"


class Stopped(Exception):
    """Raised by `opsd.train.train` once a run that was asked to stop has saved. Its text says how to go on."""


class Stop:
    """Whether a run has been asked to stop. It looks around every rollout."""

    def __init__(self) -> None:
        self.asked = False

    def take(self, number: int, _: FrameType | None) -> None:
        """A signal handler. It changes nothing the run works with: it may come in the middle of anything."""
        if self.asked and number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            raise KeyboardInterrupt
        if not self.asked:
            self.asked = True
            os.write(2, _SAID)  # print may be what was interrupted


@contextmanager
def on_signals() -> Iterator[Stop]:
    """A Stop that SIGTERM and SIGINT ask, inside; none of them is taken outside the main thread."""
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    taken = {number: handler for number, handler in before.items() if handler is not signal.SIG_IGN}  # as by nohup
    for number in taken:
        signal.signal(number, stop.take)
    try:
        yield stop
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
