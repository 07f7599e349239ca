"""A model behind an OpenAI-compatible endpoint: one request, its retries, and what it cost.

Passing failures (HTTP 408, 409, 429, 5xx, a connection that breaks or says nothing, a reply that is no JSON) are tried
again after 0.5 * 2^n seconds, up to a minute, times a random factor of 0.5 to 1.5, and not before `Retry-After`.
The key goes into one header and nowhere else: it is cut out of what a server says, and redirects are not followed,
since they would carry it to another host.
"""

from __future__ import annotations

import http.client
import json
import random
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from typing import Any, Final, TypeVar
from urllib.parse import urlsplit

from opsd.errors import InputError
from opsd.pace import Clock, Pace

T = TypeVar("T")
_PASSING: Final = {408, 409, 429, *range(500, 600)}
_PATIENCE: Final = 600.0  # seconds; an endpoint that asks for a longer wait has refused


@dataclass(frozen=True)
class Endpoint:
    """URL/chat/completions. `timeout` (s) is for silence on the line, not for the whole reply."""

    url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 120.0
    tries: int = 5

    def check(self, option: str) -> Endpoint:
        """Itself; `InputError` about `option` for what cannot be a URL of an endpoint, or a key of a header."""
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError("an http:// or https:// URL", repr(self.url), field=option)
        if "@" in parts.netloc or parts.query:
            # not shown: a secret may be in it
            raise InputError("a URL without user, password or query", "one with", field=option)
        if self.key is not None and not (self.key.isascii() and self.key.isprintable() and " " not in self.key):
            raise InputError("a key of printable ASCII characters", "others in it", field="OPENAI_API_KEY")
        return self


@dataclass(frozen=True)
class Reply:
    """What the model said, why it stopped, and the tokens of the prompt and of the reply (None where unsaid)."""

    text: str
    finish: str | None
    model: str
    prompt_tokens: int | None
    reply_tokens: int | None


class RefusedError(Exception):
    """No reply: the reason in one line, and the HTTP status where there is one. Never contains the key."""

    def __init__(self, reason: str, status: int | None = None) -> None:
        self.reason, self.status = reason, status
        super().__init__(reason)


class ChatClient:
    """Asks one endpoint at the pace it allows. Shared by threads."""

    def __init__(self, endpoint: Endpoint, pace: Pace | None = None, clock: Clock | None = None) -> None:
        self.endpoint, self.clock = endpoint, clock or Clock()
        self.pace = pace or Pace(self.clock)
        self._opener = urllib.request.build_opener(_StayHere)

    def ask(self, messages: list[dict[str, Any]], settings: Mapping[str, Any], tokens: int = 0) -> Reply:
        """The first choice of a completion. Raises `RefusedError`.

        settings: more of the body (max_tokens, ...). tokens: an estimate of what the request costs, for the pace.
        """
        body = {"model": self.endpoint.model, "messages": messages, **settings}

        def read(raw: bytes) -> Reply:
            return _read(json.loads(raw), self.endpoint.model)

        reply, admission = self._ask("chat/completions", body, read, tokens)
        if reply.prompt_tokens is not None:
            self.pace.settle(admission, reply.prompt_tokens + (reply.reply_tokens or 0))
        return reply

    def post(self, path: str, body: Mapping[str, Any] | None, read: Callable[[bytes], T]) -> T:
        """What `read` makes of the answer of URL/path; body: JSON, or None for a GET. Raises `RefusedError`.

        read raises ValueError, LookupError or TypeError for an answer that it cannot take, which is asked for again.
        """
        return self._ask(path, body, read, 0)[0]

    def _ask(self, path: str, body: Mapping[str, Any] | None, read: Callable[[bytes], T], tokens: int) -> tuple[T, Any]:
        """The answer, and the pace's admission that it came by."""
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        url = f"{self.endpoint.url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, None if body is None else json.dumps(body).encode(), headers)
        for attempt in range(self.endpoint.tries):
            admission = self.pace.admit(tokens)
            try:
                return self._once(request, read), admission
            except _PassingError as error:
                wait = max(error.wait, min(60.0, 0.5 * 2**attempt) * random.uniform(0.5, 1.5))
                if attempt == self.endpoint.tries - 1 or wait > _PATIENCE:
                    later = f"; it asks to wait {error.wait:.0f} s" if wait > _PATIENCE else ""
                    raise RefusedError(error.refused.reason + later, error.refused.status) from error
                self.clock.sleep(wait)
        raise AssertionError("the last try returns or raises")

    def _once(self, request: urllib.request.Request, read: Callable[[bytes], T]) -> T:
        try:
            with self._opener.open(request, timeout=self.endpoint.timeout) as answer:
                raw = answer.read()
        except urllib.error.HTTPError as error:
            refused = RefusedError(f"HTTP {error.code}: {self._said(error)}", error.code)
            if error.code not in _PASSING:
                raise refused from error
            raise _PassingError(refused, _retry_after(error.headers.get("Retry-After"))) from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", None) or str(error) or type(error).__name__
            raise _PassingError(RefusedError(self._without_key(f"no reply: {reason}"))) from error
        try:
            return read(raw)
        except (ValueError, LookupError, TypeError) as error:
            found = self._without_key(raw[:200].decode("utf-8", "replace")).strip()
            raise _PassingError(RefusedError(f"a reply that is no chat completion: {found!r}")) from error

    def _said(self, error: urllib.error.HTTPError) -> str:
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except (OSError, http.client.HTTPException):
            said = ""
        return " ".join(self._without_key(said).split())[:300] or str(error.reason)

    def _without_key(self, text: str) -> str:
        return text.replace(self.endpoint.key, "[key]") if self.endpoint.key else text


class _PassingError(Exception):
    def __init__(self, refused: RefusedError, wait: float = 0.0) -> None:
        self.refused, self.wait = refused, wait
        super().__init__(refused.reason)


class _StayHere(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None  # the status then comes as an HTTPError


def _read(reply: Any, model: str) -> Reply:
    choice, usage = reply["choices"][0], reply.get("usage") or {}
    text = choice["message"]["content"]
    if text is not None and not isinstance(text, str):
        raise TypeError(f"expected text, got {type(text).__name__}")
    counts = (usage.get(name) for name in ("prompt_tokens", "completion_tokens"))
    prompt_tokens, reply_tokens = (count if isinstance(count, int) else None for count in counts)
    return Reply(text or "", choice.get("finish_reason"), str(reply.get("model") or model), prompt_tokens, reply_tokens)


def _retry_after(value: str | None) -> float:
    """Seconds: the header is a number of them, or a date. 0 for neither."""
    if value is None:
        return 0.0
    try:
        return max(0.0, float(value))
    except ValueError:
        pass
    try:
        return max(0.0, parsedate_to_datetime(value).timestamp() - time.time())
    except (TypeError, ValueError):
        return 0.0
