"""What became of the arms: read from their run directories, compared on the same held-out rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from opsd.ablation.arms import ARMS, Arm
from opsd.config import Config
from opsd.errors import InputError
from opsd.intervals import Accuracy, macro_f1, paired_difference, wilson
from opsd.log import RunDir
from opsd.shelf import Shelf

Record = dict[str, Any]
REFERENCES = ("base", "opsd")  # what every arm is compared with


@dataclass(frozen=True)
class Outcome:
    """An arm that has been run to its end."""

    arm: Arm
    config: Config
    own: tuple[str, ...]  # settings that this arm alone has
    rows: list[Record]  # answers.jsonl of its last student, row by row
    metrics: list[Record]
    teacher: Record | None  # the last evaluation of the teacher's view

    @property
    def right(self) -> list[bool]:
        return [bool(row["right"]) for row in self.rows]

    @property
    def accuracy(self) -> Accuracy:
        return wilson(sum(self.right), len(self.rows))

    @property
    def samples(self) -> bool:
        """Whether the arm has answered training rows by itself."""
        return bool(self.metrics) and "accuracy" in self.metrics[0]

    def curve(self, name: str) -> tuple[list[float], list[float]]:
        """Steps, and what the responses of each were worth: `reward`, `format` or `response_length`."""
        weights = self.config.rewards
        values = [
            weights.accuracy * m["accuracy"] + weights.format * m["format"] if name == "reward" else m[name]
            for m in self.metrics
        ]
        return [m["step"] for m in self.metrics], values


def is_finished(config: Config) -> bool:
    """Whether the run directory of a config holds all of the run: its last evaluation, and its last checkpoint."""
    assert config.train.run_dir is not None
    directory, steps = RunDir(config.train.run_dir), config.train.steps
    if steps:
        last = Shelf(directory.checkpoints).newest()
        return last is not None and last.step == steps
    splits = {record["split"] for record in directory.read("answers") if record["step"] == 0}
    return splits == {split for split in ("validation", "test") if getattr(config.data, split)}


def read_outcome(arm: Arm, config: Config, own: Sequence[str]) -> Outcome:
    """The outcome of a finished arm on the test split, or on validation where there is no test."""
    assert config.train.run_dir is not None
    directory, split = RunDir(config.train.run_dir), "test" if config.data.test else "validation"

    def last(name: str, view: str) -> list[Record]:
        found = directory.read(name)
        return [r for r in found if (r["step"], r["split"], r["view"]) == (config.train.steps, split, view)]

    rows, teacher = last("answers", "student"), last("evaluations", "teacher")
    if not rows:
        raise InputError("answers of the last step", "none", file=directory.path / "answers.jsonl")
    return Outcome(arm, config, tuple(own), rows, directory.read("metrics"), teacher[-1] if teacher else None)


def summary(outcomes: Sequence[Outcome]) -> Record:
    """The budget that all arms share, and a record of each; what JSON and table say."""
    config = max((outcome.config for outcome in outcomes), key=lambda config: config.train.steps)
    budget = {
        "steps": config.train.steps,
        "prompts_per_step": config.train.prompts_per_step,
        "responses_per_prompt": config.rollout.group_size,
        "seed": config.train.seed,
        "held_out_rows": len(outcomes[0].rows),
        "held_out_split": "test" if config.data.test else "validation",
    }
    found = {outcome.arm.name: outcome for outcome in outcomes}
    return {"budget": budget, "arms": {name: _record(found[name], found) for name in ARMS if name in found}}


def _record(outcome: Outcome, others: dict[str, Outcome]) -> Record:
    labels = [row["label"].strip().lower() for row in outcome.rows]
    said = [label if row["right"] else row["answer"] for label, row in zip(labels, outcome.rows, strict=True)]
    train, objective = outcome.config.train, outcome.config.objective
    responses = train.steps * train.prompts_per_step * outcome.config.rollout.group_size
    return {
        "title": outcome.arm.title,
        "learns_from": outcome.arm.learns_from,
        "lr": outcome.config.optim.lr if train.steps else None,
        "alpha": objective.alpha if train.steps else None,
        "settings": list(outcome.own),
        "accuracy": asdict(outcome.accuracy),
        "macro_f1": asdict(macro_f1(labels, said)),
        "format": sum(row["format"] for row in outcome.rows) / len(outcome.rows),
        **{
            f"minus_{name}": asdict(paired_difference(outcome.right, _same_rows(outcome, others[name]).right))
            for name in REFERENCES
            if name in others and name != outcome.arm.name
        },
        "teacher": {k: v for k, v in outcome.teacher.items() if k in ("privilege", "accuracy", "low", "high")}
        if outcome.teacher and objective.kind == "distill"
        else None,
        "updates": train.steps * objective.updates_per_rollout,
        "sampled_responses": responses if outcome.samples else 0,
        "training_seconds": _seconds(outcome.metrics),
    }


def _same_rows(ours: Outcome, theirs: Outcome) -> Outcome:
    if [row["id"] for row in ours.rows] != [row["id"] for row in theirs.rows]:
        expected, found = f"the held-out rows of {theirs.arm.name}", f"others, in {ours.arm.name}"
        raise InputError(expected, found, file=ours.config.train.run_dir)
    return theirs


def _seconds(metrics: Sequence[Record]) -> float:
    """Of all steps: a line has the mean since the one before."""
    steps = [0, *(m["step"] for m in metrics)]
    return sum(m["seconds"] * (b - a) for m, a, b in zip(metrics, steps, steps[1:], strict=False))
