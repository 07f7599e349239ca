"""`python -m opsd.rationalize rows.jsonl --out out.jsonl --endpoint URL --model NAME`."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from opsd.chat import ChatClient, Endpoint
from opsd.cli import guard
from opsd.config import DataConfig
from opsd.data import read_examples
from opsd.errors import InputError, raise_all
from opsd.leaks import rationale_leaks
from opsd.pace import Clock, Pace
from opsd.rationales.request import ATTACHABLE, DEFAULT, RequestBuilder, read_template
from opsd.rationales.store import Store, moved
from opsd.rationales.work import Rationalizer, Row, Tally, most_tokens

_SHOWN = 100  # failures that are listed


def run(args: argparse.Namespace) -> None:
    """Read, say what will be asked, ask, say what it cost and what failed."""
    rows = _read(args.rows)
    requests = RequestBuilder(read_template(args.template or DEFAULT), _media(args.media))
    settings = _settings(args)
    key = os.environ.get("OPENAI_API_KEY") or None
    endpoint = Endpoint(args.endpoint, args.model, key, args.timeout, args.tries).check("--endpoint")
    if args.out.resolve() == args.rows.resolve():
        raise InputError("another file than the rows", str(args.out), field="--out")
    store = Store(args.out)
    if strange := store.done - {row.example.id for row in rows}:
        raise InputError(f"only rows of {args.rows.name}", f"id {min(strange)!r}", file=args.out)
    has = [row for row in rows if _keeps(row, args.replace)]
    todo = [row for row in rows if row.example.label is not None and not _keeps(row, args.replace)]
    ask = [row for row in todo if row.example.id not in store.done][: args.limit]
    _announce(rows, has, todo, ask, requests)
    _estimate(ask, requests, settings, args)
    if args.dry_run:
        return
    store.repair()
    for row in has:
        if row.example.id not in store.done:
            store.add(moved(row.raw, args.rows.parent, args.out.parent), None)
    clock = Clock()
    client = ChatClient(endpoint, Pace(clock, args.requests_per_minute, args.tokens_per_minute), clock)
    tally = Rationalizer(client, requests, store, settings).work(ask, args.concurrency)
    _finish(tally, store, rows, ask, args)


def _keeps(row: Row, replace: bool) -> bool:
    """Whether the row's own rationale stays; a row without a label has nothing to be asked about."""
    return row.example.rationale is not None and not (replace and row.example.label is not None)


def _read(path: Path) -> list[Row]:
    examples = read_examples(path, DataConfig(require_rationale=False))
    lines = path.read_bytes().split(b"\n")
    return [Row(example, json.loads(lines[example.line - 1].decode("utf-8-sig"))) for example in examples]


def _media(text: str) -> tuple[str, ...]:
    chosen = tuple(name.strip() for name in text.split(",") if name.strip())
    if set(chosen) - set(ATTACHABLE):
        raise InputError(f"some of {', '.join(ATTACHABLE)}", repr(text), field="--media")
    return chosen


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    """max_tokens and what --body adds; a null takes a setting out."""
    try:
        more = json.loads(args.body)
    except ValueError as error:
        raise InputError("a JSON object", str(error), field="--body") from error
    if not isinstance(more, dict) or {"messages", "model", "stream", "n"} & set(more):
        raise InputError("a JSON object without messages, model, stream and n", args.body, field="--body")
    return {k: v for k, v in ({"max_tokens": args.max_tokens} | more).items() if v is not None}


def _announce(rows: list[Row], has: list[Row], todo: list[Row], ask: list[Row], requests: RequestBuilder) -> None:
    print(f"{len(rows)} rows: {len(ask)} to ask for", end="")
    if len(todo) > len(ask):
        print(f", {len(todo) - len(ask)} done before or beyond --limit", end="")
    if has:
        print(f", {len(has)} have a rationale (--replace asks anew)", end="")
    if without := len(rows) - len(has) - len(todo):
        print(f", {without} left out, without a label", end="")
    print()
    kinds = {kind for row in ask for _, kind, _ in row.example.media()} - set(requests.media)
    if kinds:
        print(f"not shown to the model: {', '.join(sorted(kinds))} (see --media)")


def _estimate(ask: list[Row], requests: RequestBuilder, settings: dict[str, Any], args: argparse.Namespace) -> None:
    prompts = sum(requests.tokens(row.example) for row in ask)
    replies = most_tokens(settings) * len(ask)
    print(f"estimate: about {prompts} prompt tokens, at most {replies} reply tokens{_cost(prompts, replies, args)}")
    if args.dry_run and ask:
        print(f"\n--- {ask[0].example.id} ---\n{requests.text(ask[0].example)}")


def _cost(prompts: int, replies: int, args: argparse.Namespace) -> str:
    if args.price_in is None and args.price_out is None:
        return ""
    return f", cost {(prompts * (args.price_in or 0) + replies * (args.price_out or 0)) / 1e6:.4f}"


def _finish(tally: Tally, store: Store, rows: list[Row], ask: list[Row], args: argparse.Namespace) -> None:
    spent = _cost(tally.prompt_tokens, tally.reply_tokens, args)
    said = f" ({tally.unsaid} replies did not say)" if tally.unsaid else ""
    print(f"{tally.written} rationales: {tally.prompt_tokens} prompt, {tally.reply_tokens} reply tokens{spent}{said}")
    store.sort([row.example.id for row in rows])
    labels = {row.example.id: row.example.label for row in ask}
    written = [row for row in store.read() if str(row["id"]) in labels]
    if leaking := sum(bool(rationale_leaks(row["rationale"], labels[str(row["id"])])) for row in written):
        print(f"{leaking} of {len(written)} leak: python -m opsd.leaks {store.out}")
    print(f"{store.out}: {len(store.done)} rows; provenance: {store.provenance}")
    if tally.hopeless is not None and tally.hopeless.status == 401 and not os.environ.get("OPENAI_API_KEY"):
        raise InputError("a key", "none", field="OPENAI_API_KEY", hint=tally.hopeless.reason)
    left = len(ask) - tally.written
    if left:
        stopped = ", stopped early" if tally.stopped else ""
        print(f"{left} rows remain{stopped}: {len(tally.problems)} failed; the same command asks for them again")
    raise_all(sorted(tally.problems, key=lambda problem: problem.line or 0), limit=_SHOWN)


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m opsd.rationalize",
        description="Asks a model for the evidence behind the label of every row. The same command goes on where it "
        "was stopped. A key, if the endpoint wants one, is read from OPENAI_API_KEY.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("rows", type=Path, help="labelled rows (JSONL)")
    add("--out", type=Path, required=True, help="the rows with their rationales (JSONL)")
    add("--endpoint", required=True, metavar="URL", help="OpenAI-compatible, up to /v1")
    add("--model", required=True, help="its name there")
    add(
        "--media",
        default="",
        help="what is attached, some of image,audio,video; by default the model reads text only",
    )
    add("--template", type=Path, help="another prompt, a YAML file like opsd/rationales/prompt.yaml")
    add("--max-tokens", type=_positive, default=1024, help="of a reply; a longer one fails, it is never cut")
    add("--body", default="{}", metavar="JSON", help="more of the request, such as '{\"temperature\": 0.7}'")
    add("--concurrency", type=_positive, default=4, help="requests at a time")
    add("--requests-per-minute", type=_positive)
    add("--tokens-per-minute", type=_positive)
    add("--timeout", type=_seconds, default=120.0, help="seconds without a sign of life")
    add("--tries", type=_positive, default=5, help="per row, with growing pauses")
    add("--price-in", type=float, help="of a million prompt tokens")
    add("--price-out", type=float, help="of a million reply tokens")
    add("--limit", type=_positive, help="ask for this many rows at most")
    add("--replace", action="store_true", help="ask for rows that have a rationale too")
    add("--dry-run", action="store_true", help="only counts, an estimate of the cost, and the first prompt")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 0 < number < 1e6:
        raise ValueError(text)
    return number


def main(argv: Sequence[str] | None = None) -> int:
    return guard(run, parser(), argv)
