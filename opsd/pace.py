"""How fast an endpoint may be asked: requests and tokens in any minute, by a clock that tests can turn."""

from __future__ import annotations

import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Final

_WINDOW: Final = 60.0  # seconds


class Clock:
    """The machine's own. Seconds that only grow, and waiting for some of them."""

    def now(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class Admission:
    """One request that was let through."""

    time: float  # s
    tokens: int  # an estimate, until `Pace.settle` knows


class Pace:
    """Lets at most `requests` requests of `tokens` tokens in all through in any 60 seconds; None is no limit.

    What a request costs is known after it: it is admitted by an estimate, and its place in the window is corrected
    later. A request above the whole limit goes when the window is empty. Shared by threads.
    """

    def __init__(self, clock: Clock, requests: int | None = None, tokens: int | None = None) -> None:
        self.clock, self.requests, self.tokens = clock, requests, tokens
        self._window: deque[Admission] = deque()
        self._lock = threading.Lock()

    def admit(self, tokens: int) -> Admission:
        """Wait for a place for a request of about `tokens` tokens, and take it."""
        while True:
            with self._lock:
                now = self.clock.now()
                while self._window and self._window[0].time + _WINDOW <= now:
                    self._window.popleft()
                if self._fits(tokens):
                    self._window.append(Admission(now, tokens))
                    return self._window[-1]
                wait = self._window[0].time + _WINDOW - now
            self.clock.sleep(wait)

    def settle(self, admission: Admission, tokens: int) -> None:
        """The request cost `tokens`."""
        with self._lock:
            admission.tokens = tokens

    def _fits(self, tokens: int) -> bool:
        if not self._window:
            return True
        if self.requests is not None and len(self._window) >= self.requests:
            return False
        return self.tokens is None or sum(entry.tokens for entry in self._window) + tokens <= self.tokens
