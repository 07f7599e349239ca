"""Accuracy on held-out rows: greedy decoding, no rationale. `python -m opsd.evaluate RUN_DIR --data rows.jsonl`.

`python -m opsd.evaluate mer-unibench ...` is `opsd.affect.unibench.command`.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from opsd.answers import answer, finished_run, load_student
from opsd.cli import guard
from opsd.data import Example, labelled, read_examples
from opsd.errors import InputError, writing
from opsd.held_out import held_out_loss
from opsd.intervals import Accuracy, wilson
from opsd.prompt_cache import VIEWS, PromptCache, verify
from opsd.prompts import PromptBuilder, can_teach
from opsd.rewards import accuracy, parse_answer, well_formed


def measure(run: Any, step: int) -> None:
    """Evaluate the student's view, and the teacher's if asked, on the run's held-out rows; append the records.

    evaluations.jsonl has a line per split and view, answers.jsonl what was read off each row.
    """
    config = run.config.evaluate
    for split, rows in run.held_out.items():
        rows = labelled(rows)[: config.limit]
        own, skip = run.world.share(rows), run.config.data.on_error == "skip"
        whole = run.prompts.whole(own) if skip else own
        views: dict[str, AbstractContextManager[None]] = {"student": nullcontext()}
        if config.teacher and can_teach(rows, run.config.prompts):
            views["teacher"] = run.teacher.weights()
        for view, weights in views.items():
            build = getattr(run.prompts, view)
            prompts = (build(row) for row in run.prompts.ahead(whole, [view]))
            with weights, run.model.gathered():  # once: the processes may have different numbers of batches
                texts = answer(run.model, prompts, config.batch_size, run.config.rollout, run.budget)
            told = {row.id: _read_off(text, row) for text, row in zip(texts, whole, strict=True)}
            read = [one for one in run.world.gather([told.get(row.id) for row in own]) if one is not None]
            if not read:
                raise InputError("a row whose files decode", "none", file=getattr(run.config.data, split))
            result = wilson(sum(int(one["right"]) for one in read), len(read))
            sees = run.config.prompts.privilege if view == "teacher" else "none"
            about = {"step": step, "split": split, "view": view}
            left_out = {"skipped_rows": len(rows) - len(read)} if skip else {}
            record = about | {"privilege": sees, **asdict(result), **left_out}
            if run.config.checkpoint.best == "loss" and (split, view) == ("validation", "student"):
                record["loss"] = held_out_loss(run, whole, step)
            run.directory.append("evaluations", record)
            run.directory.append("answers", *(about | one for one in read))
            run.progress.say(f"step {step}  {split} accuracy, {view} view: {percent(result)}")
    run.model.tokens.take()  # these are no step's


def _read_off(text: str, row: Example) -> dict[str, Any]:
    worth = {"right": accuracy(text, row.label), "format": well_formed(text)}
    return {"id": row.id, "label": row.label, "answer": parse_answer(text)} | worth


def percent(result: Accuracy) -> str:
    return f"{result.accuracy:.1%} [{result.low:.1%}, {result.high:.1%}], n = {result.n}"


def run(args: argparse.Namespace) -> None:
    config, newest = finished_run(args.run_dir, best=args.checkpoint == "best")
    rows = read_examples(args.data, config.data, held_out=True)
    model = load_student(config, newest)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = PromptCache(builder, config.prompts.cache_mib, config.media.workers)
    skip = config.data.on_error == "skip"
    verify(prompts, rows, VIEWS[:1], skip=skip)
    rows = prompts.whole(rows) if skip else rows
    if not rows:
        raise InputError("a row whose files decode", "none", file=args.data)
    asked = (prompts.student(row) for row in prompts.ahead(rows, VIEWS[:1]))
    texts = answer(model, asked, config.evaluate.batch_size, config.rollout)
    out = args.out or args.run_dir / f"predictions-{args.data.stem}.jsonl"
    _write(out, rows, texts)
    if n := len(labelled(rows)):
        right = sum(int(accuracy(text, row.label)) for row, text in zip(rows, texts, strict=True))
        print(f"accuracy without rationale: {percent(wilson(right, n))}")
    print(f"answers: {out}")


def _write(out: Path, rows: list[Example], texts: list[str]) -> None:
    if not out.parent.is_dir() or out.is_dir():
        raise InputError("a file in an existing folder", str(out), field="--out")
    with writing(out), out.open("w", encoding="utf-8") as stream:
        for row, text in zip(rows, texts, strict=True):
            record = {"id": row.id, "response": text, "answer": parse_answer(text), "label": row.label}
            stream.write(json.dumps(record, ensure_ascii=False) + "\n")


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    if words[:1] == ["mer-unibench"]:
        from opsd.affect.unibench import command  # the trainer imports this module, and has no use for the benchmark

        return command.main(words[1:])
    made = argparse.ArgumentParser(
        prog="python -m opsd.evaluate",
        description="Accuracy of a run's newest or best checkpoint on held-out rows, greedy, without rationale.",
        epilog="python -m opsd.evaluate mer-unibench --help: the nine test sets of MER-UniBench",
        allow_abbrev=False,
    )
    made.add_argument("run_dir", type=Path, help="a run of opsd.train")
    made.add_argument(
        "--checkpoint",
        choices=("last", "best"),
        default="last",
        help="the newest (default), or the best on data.validation of a run with checkpoint.best",
    )
    made.add_argument("--data", type=Path, required=True, help="rows (JSONL); rationales are not read")
    made.add_argument("--out", type=Path, help="answers (JSONL); default RUN_DIR/predictions-<data name>.jsonl")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return guard(run, made, words)


if __name__ == "__main__":
    sys.exit(main())
