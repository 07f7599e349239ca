"""`python -m opsd.evaluate mer-unibench --data DIR --wheels DIR [--predictions DIR | --model RUN]`."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from opsd.affect.unibench import report
from opsd.affect.unibench.datasets import DATASETS, Dataset
from opsd.affect.unibench.extract import Extractor, Lexicon
from opsd.affect.unibench.files import Predictions, find_predictions
from opsd.affect.unibench.infer import MEDIA, QUESTION, Student, Task
from opsd.affect.unibench.labelling import labels_of
from opsd.affect.unibench.prompts import read_prompts
from opsd.affect.unibench.score import Bootstrap, Score, score
from opsd.affect.unibench.second_model import SecondModel, endpoint, local
from opsd.affect.unibench.truth import choose_datasets, read_truth
from opsd.affect.unibench.wheels import Wheels, load_wheels
from opsd.cli import guard
from opsd.errors import InputError, raise_all

T = TypeVar("T")


@dataclass(frozen=True)
class Judge:
    """Scores the checkpoints of a dataset. New files of labels go to `out`."""

    extractor: Extractor
    wheels: Wheels
    bootstrap: Bootstrap
    out: Path

    def best(self, dataset: Dataset, found: Sequence[Predictions], truth: dict[str, Any]) -> tuple[Score, str]:
        """The best score among the checkpoints, and who extracted its labels."""
        return max((self._one(dataset, place, truth) for place in found), key=lambda scored: scored[0].value)

    def _one(self, dataset: Dataset, found: Predictions, truth: dict[str, Any]) -> tuple[Score, str]:
        new = Predictions(self.out / f"results-{dataset.name}", found.stem)
        labelled = labels_of(dataset, found, new, self.extractor, truth)
        return score(dataset, truth, labelled.items, self.wheels, self.bootstrap), labelled.source


def run(args: argparse.Namespace) -> None:
    """Truths, responses, labels, scores, report. Files are all looked at before the first response is computed."""
    datasets = choose_datasets(args.datasets, DATASETS)
    wheels = load_wheels(args.wheels)
    truths = _of_each(datasets, lambda dataset: read_truth(dataset, args.data))
    home = args.predictions or args.model
    out = args.out or home / "mer-unibench"
    judge = Judge(_extractor(args, wheels), wheels, Bootstrap(args.replicates, args.seed), out)
    if args.predictions:
        found = _of_each(datasets, lambda d: find_predictions(args.predictions, d, args.name, args.checkpoint))
    else:
        student = Student(args.model, Task.of(args.media, args.question))
        found = {d.name: [student.respond(d, truths[d.name], args.data, out)] for d in datasets}
    judged = {d.name: judge.best(d, found[d.name], truths[d.name]) for d in datasets}
    scores = [scored for scored, _ in judged.values()]
    record = report.summary(args.name or home.absolute().name, scores, {d: source for d, (_, source) in judged.items()})
    report.write(out, record, scores)
    report.show(record)
    print(f"report: {out}")


def _of_each(datasets: Sequence[Dataset], read: Callable[[Dataset], T]) -> dict[str, T]:
    """`read` of every dataset, all mistakes in one message."""
    made: dict[str, T] = {}
    problems = []
    for dataset in datasets:
        try:
            made[dataset.name] = read(dataset)
        except InputError as error:
            problems.append(error)
    raise_all(problems)
    return made


def _extractor(args: argparse.Namespace, wheels: Wheels) -> Extractor:
    """The lexicon, or the model that --extractor names; a key for an endpoint comes from the environment alone."""
    if args.extractor is None:
        return Lexicon(wheels)
    if args.prompts is None:
        raise InputError(
            "toolkit/utils/qwen.py of the benchmark's code, which has the official prompts",
            "nothing",
            field="--prompts",
        )
    prompts = read_prompts(args.prompts)
    if args.extractor.startswith(("http://", "https://")):
        if args.extractor_model is None:
            raise InputError("the name of the endpoint's model", "nothing", field="--extractor-model")
        key = os.environ.get("OPENAI_API_KEY")
        return SecondModel(
            args.extractor_model, prompts, endpoint(args.extractor, args.extractor_model, key, args.seed)
        )
    folder = Path(args.extractor)
    return SecondModel(folder.absolute().name, prompts, local(folder, args.seed))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError(text)
    return number


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m opsd.evaluate mer-unibench",
        description="MER-UniBench: the nine official test sets, metrics and file layouts.",
        allow_abbrev=False,
    )
    add = made.add_argument
    add("--data", type=Path, required=True, help="the benchmark's preprocessed datasets, mer2023-dataset-process etc.")
    add("--wheels", type=Path, required=True, help="the official emotion_wheel folder")
    what = made.add_mutually_exclusive_group(required=True)
    what.add_argument("--predictions", type=Path, help="responses or labels (.npz) in results-DATASET folders")
    what.add_argument("--model", type=Path, help="a run of opsd.train; its newest checkpoint answers")
    add("--datasets", help=f"some of {','.join(DATASETS)}; default all")
    add("--name", help="the model's folder inside results-DATASET, where there are several; its name in the table")
    add("--checkpoint", default="last", help="last, best (per dataset, as the official script reports), or a name")
    add("--media", default=",".join(MEDIA), help="what the student sees and hears: some of video,audio,text")
    add("--question", default=QUESTION, help="what the student is asked")
    add("--extractor", help="a second model that extracts labels: a folder of transformers, or the URL of an endpoint")
    add("--extractor-model", help="the name of the endpoint's model; its key is read from OPENAI_API_KEY")
    add("--prompts", type=Path, help="toolkit/utils/qwen.py of the benchmark's code: the official extraction prompts")
    add(
        "--out",
        type=Path,
        help="report, scores per clip, extracted labels; default mer-unibench/ in --predictions or --model",
    )
    add("--seed", type=int, default=0, help="of the bootstrap and of a sampled extractor")
    add("--replicates", type=_positive, default=1000, help="bootstrap replicates")
    add("--debug", action="store_true", help="show the traceback of an error")
    return made


def main(argv: Sequence[str]) -> int:
    return guard(run, parser(), argv)
