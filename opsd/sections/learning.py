"""Sections of the lesson: teacher, objective, rewards, optimizer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from opsd.sections.base import Float, Section, Temperature, refuse


class TeacherConfig(Section):
    kind: Literal["ema", "frozen", "live"] = Field(default="ema", description="Averaged, initial, or current student.")
    mu: Float = Field(
        default=0.999, ge=0, lt=1, description="EMA decay per step: mu^n of the start is left after n steps."
    )
    lora_average: Literal["dense", "freeze_a", "factors"] = Field(
        default="dense",
        description="EMA of an adapter: exact dense, exact with A frozen, or of A and B apart (approximate).",
    )


class ObjectiveConfig(Section):
    kind: Literal["distill", "sft", "reward"] = Field(default="distill", description="What is trained.")
    divergence: Literal["jsd", "reverse_kl", "forward_kl"] = Field(default="jsd", description="Per-token divergence.")
    beta: Float = Field(default=0.5, description="Teacher's weight in the JSD mixture, from 1e-6 to 1 - 1e-6.")
    temperature: Temperature = Field(default=1.0, description="Temperature of both distributions.")
    alpha: Float = Field(
        default=0.0, ge=0, description="Weight of the reward term beside distillation; 0 leaves it out."
    )
    ratio_clip: Float = Field(
        default=0.2, gt=0, lt=1, description="reward: importance ratios count from 1 - this to 1 + this."
    )
    updates_per_rollout: int = Field(
        default=1, ge=1, description="reward: updates on the same responses; the clip works from the second on."
    )
    workspace_mib: int = Field(default=1200, ge=1, description="Memory for logits of one chunk (MiB).")
    backend: Literal["auto", "triton", "native", "torch"] = Field(
        default="auto", description="Row kernels of the loss."
    )
    teacher_view_fraction: Float = Field(default=0.0, ge=0, le=1, description="sft: share of rows seen with privilege.")

    @model_validator(mode="after")
    def _checks(self) -> ObjectiveConfig:
        if self.divergence == "jsd" and not 1e-6 <= self.beta <= 1 - 1e-6:
            raise refuse("beta", "a number from 1e-6 to 1 - 1e-6 for divergence jsd", self.beta)
        if self.alpha and self.kind != "distill":
            raise refuse("alpha", f"0 for objective.kind {self.kind}", self.alpha)
        if self.updates_per_rollout > 1 and self.kind != "reward":
            raise refuse("updates_per_rollout", f"1 for objective.kind {self.kind}", self.updates_per_rollout)
        if self.teacher_view_fraction and self.kind != "sft":
            raise refuse("teacher_view_fraction", f"0 for objective.kind {self.kind}", self.teacher_view_fraction)
        return self


class RewardsConfig(Section):
    accuracy: Float = Field(default=1.0, description="Weight of the right answer.")
    format: Float = Field(default=1.0, description="Weight of <think>..</think><answer>..</answer>.")


class OptimConfig(Section):
    kind: Literal["adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit"] = Field(
        default="adamw",
        description="AdamW's moments: fp32; as 8-bit codes; paged to the host where the GPU is full (bitsandbytes).",
    )
    lr: Float = Field(default=1e-6, ge=0, description="Peak learning rate of AdamW.")
    betas: Annotated[tuple[Float, Float], Field(strict=False)] = Field(
        default=(0.9, 0.999), description="AdamW decays."
    )
    eps: Float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: Float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: Float | None = Field(default=1.0, gt=0, description="Clip the gradient's norm; null does not clip.")
    in_backward: bool = Field(
        default=False,
        description="Update a weight and free its gradient as soon as that is whole; a clip takes a second backward.",
    )
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="After the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, betas: Any) -> Any:
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise refuse("betas", "a list of two numbers", betas)
        return betas

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise refuse("betas", "two numbers in [0, 1)", list(betas))
        return betas
