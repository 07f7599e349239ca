"""Config files and rows that nobody should write: every one is accepted as what it says, or refused with its place."""

from __future__ import annotations

import json
import signal
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st

from opsd.config import load_config
from opsd.config_problems import SECTIONS
from opsd.data import read_examples
from opsd.errors import InputError, InputErrors
from opsd.sections import DataConfig

LIMIT = 5.0  # seconds after which an input counts as a hang

ROW = {
    "id": "clip-1",
    "prompt": [{"role": "user", "content": [{"type": "text", "text": "which emotion?"}]}],
    "rationale": "the voice is low",
    "label": "sad",
}
CONFIG = {
    "model": {"path": "model"},
    "data": {"train": "rows.jsonl", "labels": ["sad", "happy"]},
    "optim": {"lr": 1e-4, "betas": [0.9, 0.99]},
    "rollout": {"group_size": 4, "stop": ["end"]},
    "train": {"steps": 10},
}
PLACES = [(section, key) for section, model in SECTIONS.items() for key in model.model_fields]
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 8)}]\n" for n in range(1, 12)
)

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.integers(min_value=2**62, max_value=2**80),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(["1e-3", "-1", "yes", "~", "{rationale}", "\ud83d", "../../x", "http://x/y.png", "~no", "\x00"]),
)
values = st.recursive(
    scalars, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=4), v, max_size=3), max_leaves=6
)
garbage = st.one_of(
    st.binary(max_size=24),
    st.sampled_from([
        b"!!python/object/apply:os.system ['touch CANARY']",
        b"!!python/object/new:os.system ['touch CANARY']",
        b"!!python/name:os.system",
        b"&a [*a]", b"&a {b: *a}", b"<<: *nothing", b"model: &a &a ", b"? [1, 2]\n: 3", b"---\n---\n",
        b"\xff\xfe", b"\xef\xbb\xbf", b"\x00", b"\xed\xa0\x80", b'"\\ud800"', b'"\\x"',
        b"{" * 2000, b"[" * 2000, b"- " * 2000, b"9" * 5000, b"1e999", b"2020-13-45", b"0o9",
        b"!!binary x", b"!!int x", b"!!float x", b"!!timestamp x", b"!!set {a, b}", b"!!omap [a: 1]", LAUGHS.encode(),
    ]),
)  # fmt: skip


@st.composite
def config_files(draw: st.DrawFn) -> bytes:
    """A valid config with a key set to anything, a key that does not exist, or bytes put, cut or exchanged."""
    config: Any = json.loads(json.dumps(CONFIG))
    for _ in range(draw(st.integers(0, 2))):
        section, key = draw(st.sampled_from(PLACES) | st.tuples(st.text(max_size=6), st.text(max_size=6)))
        if draw(st.booleans()):
            config[section] = draw(values)
        elif isinstance(config.setdefault(section, {}), dict):
            config[section][key] = draw(values)
    text = yaml.safe_dump(config, allow_unicode=draw(st.booleans())).encode("utf-8", "surrogatepass")
    return draw(_spoilt(text))


@st.composite
def row_files(draw: st.DrawFn) -> bytes:
    """Three rows, the second of them with a field set to anything, or bytes put, cut or exchanged."""
    row: Any = json.loads(json.dumps(ROW))
    for _ in range(draw(st.integers(0, 2))):
        known = st.sampled_from([*ROW, "answer", "subtitle", "teacher_media", "privileged_context"])
        row[draw(known | st.text(max_size=5))] = draw(
            values | st.just([{"role": "user", "content": draw(values)}]) | _parts()
        )
    spoilt = draw(_spoilt(json.dumps(row).encode()))
    first, last = ({**ROW, "id": name} for name in ("first", "last"))
    return b"\n".join([json.dumps(first).encode(), spoilt, json.dumps(last).encode(), b""])


def _parts() -> st.SearchStrategy[Any]:
    kinds = st.sampled_from(["text", "image", "audio", "video", "txet"])
    part = st.tuples(kinds, kinds, values).map(lambda found: {"type": found[0], found[1]: found[2]})
    return part.map(lambda one: [{"role": "user", "content": [one]}])


@st.composite
def _spoilt(draw: st.DrawFn, text: bytes) -> bytes:
    how = draw(st.sampled_from(["whole", "whole", "put", "cut", "flip", "end", "only"]))
    at = draw(st.integers(0, len(text) - 1))
    if how == "put":
        return text[:at] + draw(garbage) + text[at:]
    if how == "cut":
        return text[:at]
    if how == "flip":
        return text[:at] + bytes([text[at] ^ (1 << draw(st.integers(0, 7)))]) + text[at + 1 :]
    if how == "end":
        return text + draw(garbage)
    return draw(garbage) if how == "only" else text


def refusals(kind: str, inputs: int) -> dict[str, int]:
    """How many malformed files were refused, at least `inputs`, and how many were well-formed after all.

    Raises what an input made the reader raise, but for InputError; AssertionError for one without its place.
    """
    counts = {"refused": 0, "accepted": 0}
    with tempfile.TemporaryDirectory() as folder:

        def read(content: bytes) -> None:
            counts["refused" if _read(kind, Path(folder), content) else "accepted"] += 1
            assert not list(Path.cwd().glob("CANARY")), "an input ran a command"

        seeded = 0
        while counts["refused"] < inputs:
            calm = settings(
                max_examples=max(50, inputs - counts["refused"]), deadline=None, database=None,
                phases=[Phase.generate, Phase.shrink], suppress_health_check=list(HealthCheck),
            )  # fmt: skip
            calm(seed(seeded)(given({"config": config_files(), "rows": row_files()}[kind])(read)))()
            seeded += 1
    return counts


def _read(kind: str, folder: Path, content: bytes) -> bool:
    """Whether the file was refused; where it was, the message has its place."""
    path = folder / ("run.yaml" if kind == "config" else "rows.jsonl")
    path.write_bytes(content)
    reads: dict[str, Callable[[], Any]] = {
        "config": lambda: load_config(path),
        "rows": lambda: read_examples(path, DataConfig()),
    }
    try:
        with _in_time():
            reads[kind]()
    except InputError as error:
        refused = error
    else:
        return False
    for problem in refused.problems if isinstance(refused, InputErrors) else (refused,):
        _check_place(kind, problem, path)
    assert len(str(refused)) < 10_000, "a message that nobody reads"
    return True


def _check_place(kind: str, problem: InputError, path: Path) -> None:
    assert problem.file == path, problem
    if kind == "rows":
        assert problem.line is not None or "empty dataset" in str(problem), problem
    elif problem.field is None:  # the file as a whole
        assert problem.expected in ("valid YAML", "a readable YAML file", "a mapping of sections"), problem
    elif problem.field != "model.path" and problem.expected != "each key once":
        assert problem.line is not None or problem.field.split(".")[0] in SECTIONS, problem


@contextmanager
def _in_time() -> Iterator[None]:
    def late(*_: object) -> None:
        raise TimeoutError(f"more than {LIMIT} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, LIMIT)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
