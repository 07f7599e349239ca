"""Asks for the rationale of every row, several at a time, and keeps what came back."""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any, Final

from opsd.chat import ChatClient, RefusedError, Reply
from opsd.data import Example
from opsd.errors import InputError
from opsd.rationales.request import RequestBuilder
from opsd.rationales.store import Store, moved

GIVE_UP: Final = 20  # rows in a row that fail: the endpoint is down, not the rows
_HOPELESS: Final = {301, 302, 303, 307, 308, 401, 402, 404}  # no other row would fare better
_THOUGHTS: Final = re.compile(r"\A\s*<think>.*?</think>", re.DOTALL)


@dataclass(frozen=True)
class Row:
    """A checked row, and the object its line holds."""

    example: Example
    raw: dict[str, Any]


@dataclass
class Tally:
    """What the requests so far came to."""

    written: int = 0
    prompt_tokens: int = 0
    reply_tokens: int = 0
    unsaid: int = 0  # replies without usage
    problems: list[InputError] = field(default_factory=list)
    in_a_row: int = 0  # failures since the last success
    hopeless: RefusedError | None = None

    @property
    def stopped(self) -> bool:
        return self.hopeless is not None or self.in_a_row >= GIVE_UP


class Rationalizer:
    """Turns rows into rows with rationales in a store. `settings` go into every request's body."""

    def __init__(self, client: ChatClient, requests: RequestBuilder, store: Store, settings: dict[str, Any]) -> None:
        self.client, self.requests, self.store, self.settings = client, requests, store, settings
        self.tally = Tally()
        self._lock = threading.Lock()

    def work(self, rows: Sequence[Row], concurrency: int) -> Tally:
        """Every row once, at most `concurrency` at a time. After Ctrl-C those on their way are still kept."""
        left = iter(rows)
        with ThreadPoolExecutor(concurrency) as pool:
            flying: set[Future[None]] = set()
            while True:
                while len(flying) < concurrency and not self.tally.stopped and (row := next(left, None)) is not None:
                    flying.add(pool.submit(self._one, row))
                if not flying:
                    return self.tally
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                for future in done:
                    future.result()  # raises what is no failure of a row: a full disk, a mistake of ours

    def _one(self, row: Row) -> None:
        try:
            tokens = self.requests.tokens(row.example) + most_tokens(self.settings)
            reply = self.client.ask(self.requests.messages(row.example), self.settings, tokens)
            self._count(reply)
            text = _rationale(reply)
        except RefusedError as error:
            self._failed(row, row.example.problem("rationale", "a reply", error.reason), error)
        except InputError as error:  # a medium that does not decode
            self._failed(row, row.example.problem("prompt", error.expected, f"{error.found} in {error.file}"), None)
        else:
            self.store.add(self._with(row, text), self._provenance(row, reply))
            with self._lock:
                self.tally.written += 1
                self.tally.in_a_row = 0

    def _count(self, reply: Reply) -> None:
        with self._lock:
            self.tally.prompt_tokens += reply.prompt_tokens or 0
            self.tally.reply_tokens += reply.reply_tokens or 0
            self.tally.unsaid += reply.prompt_tokens is None

    def _failed(self, row: Row, problem: InputError, refused: RefusedError | None) -> None:
        with self._lock:
            self.tally.problems.append(problem)
            if refused is not None:
                self.tally.in_a_row += 1
                if refused.status in _HOPELESS:
                    self.tally.hopeless = refused

    def _with(self, row: Row, text: str) -> dict[str, Any]:
        kept = {k: v for k, v in row.raw.items() if k not in ("rationale", "privileged_context")}
        return moved(kept, row.example.file.parent, self.store.out.parent) | {"rationale": text}

    def _provenance(self, row: Row, reply: Reply) -> dict[str, Any]:
        return {
            "id": row.example.id,
            "model": reply.model,
            "template": self.requests.template.digest,
            "media": list(self.requests.media),
            "finish_reason": reply.finish,
            "prompt_tokens": reply.prompt_tokens,
            "reply_tokens": reply.reply_tokens,
            "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


def most_tokens(settings: dict[str, Any]) -> int:
    """The limit of a reply's length that is sent, or 0 for none."""
    limits = (settings.get(name) for name in ("max_tokens", "max_completion_tokens"))
    return next((limit for limit in limits if isinstance(limit, int)), 0)


def _rationale(reply: Reply) -> str:
    """The reply without a leading block of thoughts. Raises `RefusedError` for what no row may hold."""
    text = _THOUGHTS.sub("", reply.text).strip()
    if reply.finish == "length":
        raise RefusedError("one that was cut at its token limit (--max-tokens)")
    if reply.finish == "content_filter":
        raise RefusedError("one that the endpoint's filter has cut")
    if not text:
        raise RefusedError("an empty one")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise RefusedError("one with half of a surrogate pair")
    return text
