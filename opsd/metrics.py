"""What a step measured, and the line of metrics.jsonl it becomes."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from opsd.config import TrainConfig
from opsd.data import Example
from opsd.errors import InputError
from opsd.group import Group
from opsd.log import PHASES, peak_memory_mib
from opsd.page.tokens import pieces
from opsd.run import Run

_PHASES = {"distill": PHASES, "reward": ("rollout", "student"), "sft": ("student",)}  # where tokens are computed


class Sums:
    """Sums of one step over its micro-batches; they stay on the device until they are read."""

    def __init__(self, logged: bool = False) -> None:
        """logged: a line of metrics.jsonl will tell of them, so that what costs something is measured too."""
        self.logged = logged
        self._sums: dict[str, Tensor | float] = {}
        self._largest: list[Tensor] = []  # divergence of a token, of every micro-batch
        self._divergences: list[tuple[Group, Tensor]] = []

    def add(self, **values: Tensor | float) -> None:
        for name, value in values.items():
            self._sums[name] = self._sums.get(name, 0.0) + value

    @property
    def loss(self) -> Tensor | float:
        """Of the micro-batches so far."""
        return self._sums.get("loss", 0.0)

    def tokens(self, group: Group, values: dict[str, Tensor]) -> None:
        """What `distill_loss` tells of the tokens of a micro-batch, (N,) each."""
        gap = (values["student_entropy"] - values["teacher_entropy"]).abs()
        self.add(entropy_gap=gap.sum(), **{name: value.sum() for name, value in values.items()})
        self._largest.append(values["divergence"].amax())
        self._divergences.append((group, values["divergence"]))

    def read(self) -> dict[str, float]:
        return {name: float(value) for name, value in self._sums.items()}

    def largest_divergence(self) -> float | None:
        return float(torch.stack(self._largest).amax()) if self._largest else None

    def divergences(self, wanted: list[tuple[Example, str]]) -> list[list[float] | None]:
        """Per token of some responses, each named by its row and its text; None without a teacher."""
        found: dict[tuple[int, str], Tensor] = {}
        for group, values in self._divergences:
            parts = values.split(list(group.responses.lengths))
            found |= {(id(row), text): part for row, text, part in zip(group.rows, group.texts, parts, strict=True)}
        parts_wanted = [found.get((id(row), text)) for row, text in wanted]
        return [None if part is None else part.tolist() for part in parts_wanted]


def log_step(run: Run, step: int, sums: Sums, group: Group) -> None:
    """One line of metrics.jsonl after `step` updates, and now and then some sampled responses.

    Per token: divergence, entropies and entropy_gap |H_S - H_T| (nats), top1_agreement, the share on which both sides
    find the same token likeliest, topk_overlap, the share of their 16 likeliest that both have (32 tokens of a pass,
    opsd.objectives.overlap), and clipped, the share to which the ratio's clip leaves no gradient. divergence_max
    is that of a single token: the tail that a mean hides. Per response: accuracy, format, truncated (no end came),
    response_length (tokens), and leak_rate, the share that speaks of what only the teacher sees. skipped_updates: left
    out since the last line; partial_updates: those of them in which some weights moved (optim.in_backward).
    Speeds are response tokens per second of a phase. computed_tokens went through the decoder in this step,
    padded_tokens would have in a padded loop without sharing; saved_tokens is the share that did not. skipped_rows is
    how many rows of the step had a file that does not decode. Beside the rollout, whose texts are read on the host,
    this is where the host waits for the device. With several processes all of it is of all of them, but for what a
    cache did and the samples, which are the first one's.
    """
    counts = run.model.tokens.take()
    config = run.config.log
    if config.samples_every and (step % config.samples_every == 0 or step == 1):
        _log_samples(run, step, group, sums)
    if step % config.every and step != run.config.train.steps:
        return
    values, seconds = _of_all(run, sums.read() | group.scores), run.clock.read()
    if run.config.data.on_error == "skip":
        counts["skipped_rows"] = run.replaced
    counts = run.world.sum(counts)
    skipped, in_a_row = run.optimizer.skipped.take()
    tokens, responses = values.pop("tokens"), values.pop("responses")
    if overlapping := values.pop("overlap_tokens", 0.0):
        values["topk_overlap"] = values["topk_overlap"] * tokens / overlapping
    record = {"step": step, "loss": values.pop("loss"), "response_length": tokens / responses}
    for name in ("grad_norm", "lr"):
        record[name] = values.pop(name)
    per_token = (
        "divergence",
        "student_entropy",
        "teacher_entropy",
        "entropy_gap",
        "top1_agreement",
        "clipped",
        "topk_overlap",
    )
    record |= {name: value / (tokens if name in per_token else responses) for name, value in values.items()}
    if (largest := sums.largest_divergence()) is not None:
        record["divergence_max"] = run.world.largest(largest)
    steps = step - run.logged
    objective = run.config.objective
    passes = {"student": objective.updates_per_rollout}
    record |= {
        f"{p}_tokens_per_second": passes.get(p, 1) * steps * tokens / seconds[p] for p in _PHASES[objective.kind]
    }
    record |= {"skipped_updates": float(skipped)} | run.optimizer.metrics()
    record |= counts | {"saved_tokens": 1.0 - counts["computed_tokens"] / counts["padded_tokens"]}
    if run.teacher_cache is not None:
        record |= run.teacher_cache.metrics()
    features = run.model.towers.metrics()
    if any(features.values()):  # some tower is frozen
        record |= {f"feature_cache_{name}": float(value) for name, value in features.items()}
    record |= {
        "seconds": sum(seconds.values()) / steps,
        "peak_memory_mib": run.world.largest(peak_memory_mib(run.model.device)),
        "memory_retries": run.world.sum({"retries": run.budget.retries})["retries"],
    }
    run.logged = step
    run.directory.append("metrics", record)
    run.progress.step(record)
    if skipped:
        run.progress.say(f"step {step}: loss or gradient was no number; {skipped} updates left out")
    if partial := record.get("partial_updates"):
        run.progress.say(f"step {step}: {partial:.0f} of them in part: weights had moved when a gradient was no number")
    _check_skipped(in_a_row, run.config.train, step)


def _of_all(run: Run, values: dict[str, float]) -> dict[str, float]:
    """Sums over the processes of everything but what the update itself found, which all of them know."""
    known = {name: values[name] for name in ("grad_norm", "lr")}
    return run.world.sum({name: value for name, value in values.items() if name not in known}) | known


def _check_skipped(in_a_row: int, config: TrainConfig, step: int) -> None:
    if in_a_row > config.max_skipped_updates:
        raise InputError(
            "a finite loss and gradient",
            f"none in {in_a_row} updates until step {step}, which were left out",
            field="train.max_skipped_updates",
            hint="a lower optim.lr? --resume goes on from the last checkpoint",
        )


def _log_samples(run: Run, step: int, group: Group, sums: Sums) -> None:
    """The first responses of the step, with what every token added to the text and its divergence."""
    some = list(zip(group.rows, group.texts, strict=True))[: run.config.log.samples]
    for place, ((row, text), divergences) in enumerate(zip(some, sums.divergences(some), strict=True)):
        record = {"step": step, "id": row.id, "label": row.label, "response": text}
        if divergences is not None:
            ids = group.responses.tokens[place, : len(divergences)].tolist()
            record["tokens"] = pieces(run.model.tokenizer, ids)
            record["divergence"] = [float(f"{v:.4g}") if math.isfinite(v) else None for v in divergences]
        run.directory.append("samples", record)
        if place < run.config.log.show:
            run.progress.sample(record)
