"""One request to a chat endpoint: retries, pace, and a key that goes nowhere else."""

from __future__ import annotations

import threading
from email.utils import formatdate

import pytest

from opsd import chat
from opsd.chat import ChatClient, Endpoint, RefusedError
from opsd.errors import InputError
from opsd.pace import Pace
from tests.endpoints import FakeClock, completion, serving

KEY = "sk-very-secret-123"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture
def server():
    with serving() as made:
        yield made


@pytest.fixture
def clock():
    return FakeClock()


def client(server, clock, key=KEY, pace=None, **settings):
    return ChatClient(Endpoint(server.url, "m", key, **settings), pace, clock)


def test_a_request_and_its_reply(server, clock):
    server.reply = lambda body: completion("Grüße 😀", model="m-2026")
    reply = client(server, clock).ask(HELLO, {"temperature": 0.5})
    assert (reply.text, reply.finish, reply.model) == ("Grüße 😀", "stop", "m-2026")
    assert (reply.prompt_tokens, reply.reply_tokens) == (100, 20)
    path, headers, body = server.seen[0]
    assert (path, headers["Authorization"]) == ("/v1/chat/completions", f"Bearer {KEY}")
    assert body == {"model": "m", "messages": HELLO, "temperature": 0.5}
    assert not clock.slept


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_there_is_no_header(server, clock, key):
    client(server, clock, key).ask(HELLO, {})
    assert "Authorization" not in server.seen[0][1]


@pytest.mark.parametrize("value", ["7", formatdate(2e9 + 7, usegmt=True)])
def test_retry_after_is_honoured(server, clock, value, monkeypatch):
    monkeypatch.setattr("opsd.chat.time.time", lambda: 2e9)
    server.script = [(429, {"Retry-After": value}, b"slow down")]
    assert client(server, clock).ask(HELLO, {}).text
    assert clock.slept == [7.0] and len(server.seen) == 2


def test_too_long_a_wait_is_a_refusal(server, clock):
    server.script = [(429, {"Retry-After": "86400"}, b"quota")]
    with pytest.raises(RefusedError, match="HTTP 429: quota; it asks to wait 86400 s"):
        client(server, clock).ask(HELLO, {})
    assert not clock.slept


def test_failures_of_a_server_pass_with_growing_pauses(server, clock):
    server.script = [(500, {}, b""), (503, {}, b""), (502, {}, b"")]
    assert client(server, clock).ask(HELLO, {}).text
    assert len(server.seen) == 4
    for n, seconds in enumerate(clock.slept):
        assert 0.25 * 2**n <= seconds <= 0.75 * 2**n


def test_it_gives_up_after_its_tries(server, clock):
    server.script = [(500, {}, b"broken")] * 9
    with pytest.raises(RefusedError, match="HTTP 500: broken"):
        client(server, clock, tries=3).ask(HELLO, {})
    assert (len(server.seen), len(clock.slept)) == (3, 2)


@pytest.mark.parametrize(
    "body", [b"<html>gateway</html>", b"", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[]"]
)
def test_a_reply_that_is_none_is_asked_for_again(server, clock, body):
    server.script = [(200, {}, body)]
    assert client(server, clock).ask(HELLO, {}).text
    server.script = [(200, {}, body)] * 2
    with pytest.raises(RefusedError, match="a reply that is no chat completion"):
        client(server, clock, tries=2).ask(HELLO, {})


def test_silence_is_a_failure_that_passes(server, clock):
    silent = threading.Event()
    waits = [True]

    def reply(body):
        if waits:
            waits.pop()
            silent.wait(10)
        return completion("at last")

    server.reply = reply
    assert client(server, clock, timeout=0.1).ask(HELLO, {}).text == "at last"
    silent.set()
    assert len(server.seen) == 2 and len(clock.slept) == 1


def test_a_closed_port_is_a_refusal(server, clock):
    server.shutdown()
    server.server_close()
    with pytest.raises(RefusedError, match=r"no reply: .*refused"):
        client(server, clock).ask(HELLO, {})
    assert len(clock.slept) == 4


@pytest.mark.parametrize("status", [400, 401, 403, 404, 422])
def test_a_refusal_is_not_repeated_and_never_shows_the_key(server, clock, status):
    server.script = [(status, {}, f"Incorrect API key provided:\n {KEY}.".encode())]
    with pytest.raises(RefusedError) as caught:
        client(server, clock).ask(HELLO, {})
    assert str(caught.value) == f"HTTP {status}: Incorrect API key provided: [key]."
    assert caught.value.status == status and len(server.seen) == 1


def test_the_key_does_not_follow_a_redirect(server, clock):
    with serving() as other:
        server.script = [(302, {"Location": f"{other.url}/chat/completions"}, b"")]
        with pytest.raises(RefusedError, match="HTTP 302"):
            client(server, clock).ask(HELLO, {})
        assert not other.seen


def test_the_key_is_in_no_text_of_the_endpoint():
    assert KEY not in repr(Endpoint("http://h/v1", "m", KEY))


@pytest.mark.parametrize(
    ("url", "key", "said"),
    [
        ("ftp://h/v1", None, "expected an http:// or https:// URL; found 'ftp://h/v1'"),
        ("h:8000/v1", None, "expected an http"),
        ("http://me:hidden@h/v1", None, "without user, password or query"),
        ("http://h/v1?key=hidden", None, "without user, password or query"),
        ("http://h/v1", "hidden\n", "a key of printable ASCII"),
        ("http://h/v1", "hidden key", "a key of printable ASCII"),
        ("http://h/v1", "hiddén", "a key of printable ASCII"),
    ],
)
def test_what_cannot_be_an_endpoint_is_refused(url, key, said):
    with pytest.raises(InputError, match=said) as caught:
        Endpoint(url, "m", key).check("--endpoint")
    assert "hidd" not in str(caught.value)


def test_every_minute_has_its_requests(clock):
    pace = Pace(clock, requests=3)
    times = []
    for _ in range(8):
        pace.admit(0)
        times.append(clock.time - 1000.0)
        clock.time += 1.0
    assert times == [0, 1, 2, 60, 61, 62, 120, 121]


def test_every_minute_has_its_tokens(clock):
    pace = Pace(clock, tokens=1000)
    first = pace.admit(900)
    pace.settle(first, 300)  # it cost less than was thought
    pace.admit(700)
    assert clock.time == 1000.0
    pace.admit(300)
    assert clock.time == 1060.0
    pace.admit(5000)  # more than there is in a minute: alone in its own
    assert clock.time == 1120.0


def test_retries_keep_the_pace_and_usage_settles_it(server, clock):
    server.script = [(500, {}, b"")]
    pace = Pace(clock, requests=1)
    client(server, clock, pace=pace).ask(HELLO, {}, tokens=5)
    assert clock.time == pytest.approx(1060.0), "the second try waited for the next minute"
    pace = Pace(clock, tokens=1000)
    client(server, clock, pace=pace).ask(HELLO, {}, tokens=1000)  # costs 120
    before = clock.time
    pace.admit(880)
    assert clock.time == before


def test_the_jitter_is_there(server, clock, monkeypatch):
    monkeypatch.setattr(chat.random, "uniform", lambda low, high: high)
    server.script = [(500, {}, b"")] * 2
    client(server, clock).ask(HELLO, {})
    assert clock.slept == [0.75, 1.5]
