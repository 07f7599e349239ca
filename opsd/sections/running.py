"""Sections of the run itself: length, checkpoints, log, evaluation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from opsd.sections.base import Local, Section


class CheckpointConfig(Section):
    every: int = Field(default=0, ge=0, description="Steps between checkpoints; 0 writes one at the end only.")
    keep: int = Field(default=2, ge=1, description="Checkpoints kept, the newest ones.")
    best: Literal["none", "accuracy", "loss"] = Field(
        default="none",
        description="Also save and keep the best by the student's accuracy or the objective's loss on data.validation.",
    )


class LogConfig(Section):
    every: int = Field(default=1, ge=1, description="Steps between lines of metrics.jsonl.")
    samples_every: int = Field(default=20, ge=0, description="Steps between sampled responses; 0 writes none.")
    samples: int = Field(default=4, ge=0, description="Responses written each time.")
    show: int = Field(default=0, ge=0, description="Of those, how many also in the terminal, token by token.")
    to: Annotated[tuple[Literal["tensorboard", "wandb", "trackio"], ...], Field(strict=False)] = Field(
        default=(), description="Trackers that get every number too, each installed by its own name."
    )
    project: str = Field(default="opsd", min_length=1, description="Name of the project in W&B and trackio.")
    progress: Literal["auto", "rich", "plain", "none"] = Field(default="auto", description="auto: rich on a terminal.")


class EvaluateConfig(Section):
    every: int = Field(default=0, ge=0, description="Steps between evaluations; 0 evaluates before and after only.")
    batch_size: int = Field(default=32, ge=1, description="Prompts decoded together.")
    limit: int | None = Field(default=None, ge=1, description="Use the first rows only; null uses all.")
    teacher: bool = Field(default=True, description="Also measure the teacher's view.")


class TrainConfig(Section):
    steps: int = Field(
        default=100, ge=0, description="Batches of prompts; an update each, or objective.updates_per_rollout."
    )
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts per update, over all micro-batches.")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Seed of data order, sampling and initialisation.")
    max_skipped_updates: int = Field(
        default=5,
        ge=0,
        description="Updates in a row that may be left out since loss or gradient is no number; one more ends the run.",
    )
    run_dir: Local | None = Field(
        default=None, description="Folder of the run; null takes the next free runs/<name>-NNN."
    )
    parallel: Literal["ddp", "fsdp"] = Field(
        default="ddp",
        description="Under torchrun: ddp keeps the whole model on every process, fsdp a slice of it (FSDP2).",
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null leaves torch's choice.")
