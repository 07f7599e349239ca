"""A chat endpoint on this machine that answers as a test tells it to, and a clock that stands still."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from opsd.pace import Clock


class FakeClock(Clock):
    """Sleeping moves it, and takes no time."""

    def __init__(self) -> None:
        self.time, self.slept = 1000.0, []

    def now(self) -> float:
        return self.time

    def sleep(self, seconds: float) -> None:
        self.slept.append(seconds)
        self.time += seconds


def completion(text: Any, finish: str = "stop", **more: Any) -> dict[str, Any]:
    usage = {"prompt_tokens": 100, "completion_tokens": 20}
    return {"choices": [{"message": {"content": text}, "finish_reason": finish}], "usage": usage, **more}


class Endpoint(ThreadingHTTPServer):
    """`script` holds what the next requests get: (status, headers, body). When it is empty, `reply` answers with such
    a triple, or with a body alone.

    seen: (path, headers, body) of every request.
    """

    daemon_threads = True
    block_on_close = False  # a test of timeouts leaves a handler waiting

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.seen: list[tuple[str, dict[str, str], dict[str, Any]]] = []
        self.script: list[tuple[int, dict[str, str], Any]] = []
        self.reply: Callable[[dict[str, Any]], Any] = lambda body: completion("Her brows are raised.")
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that was killed, or would not wait, is what the tests are about."""


class Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or "{}")
        self.server.seen.append((self.path, dict(self.headers), body))
        answer = self.server.script.pop(0) if self.server.script else self.server.reply(body)
        status, headers, said = answer if isinstance(answer, tuple) else (200, {}, answer)
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(said if isinstance(said, bytes) else json.dumps(said).encode())

    do_GET = do_POST

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving() -> Iterator[Endpoint]:
    made = Endpoint()
    threading.Thread(target=made.serve_forever, args=(0.01,), daemon=True).start()
    yield made
    made.shutdown()
    made.server_close()
