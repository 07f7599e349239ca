"""What a run can be told: one frozen section per module that reads it. `opsd.config` reads and writes them.

Units and letters are those of the project: G responses per prompt, steps are optimizer updates.
"""

from __future__ import annotations

from pydantic import model_validator

from opsd.sections.base import Section, at_home, refuse
from opsd.sections.engine import EngineConfig, RolloutConfig
from opsd.sections.inputs import TEACHER_TEMPLATE, DataConfig, MediaConfig, PromptsConfig
from opsd.sections.learning import ObjectiveConfig, OptimConfig, RewardsConfig, TeacherConfig
from opsd.sections.model import ModelConfig
from opsd.sections.running import CheckpointConfig, EvaluateConfig, LogConfig, TrainConfig


class Config(Section):
    """Everything a run depends on, resolved."""

    data: DataConfig = DataConfig()
    prompts: PromptsConfig = PromptsConfig()
    media: MediaConfig = MediaConfig()
    model: ModelConfig
    engine: EngineConfig = EngineConfig()
    rollout: RolloutConfig = RolloutConfig()
    teacher: TeacherConfig = TeacherConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    rewards: RewardsConfig = RewardsConfig()
    optim: OptimConfig = OptimConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    train: TrainConfig = TrainConfig()

    @model_validator(mode="after")
    def _across(self) -> Config:
        if self.objective.kind == "reward" and self.rollout.group_size < 2:
            raise refuse("rollout.group_size", "at least 2 for objective.kind reward, which compares responses", 1)
        if self.teacher.lora_average != "dense" and self.model.adapter != "lora":
            raise refuse("teacher.lora_average", "dense when model.adapter is not lora", self.teacher.lora_average)
        if self.rollout.server and self.model.adapter != "lora":
            raise refuse(
                "rollout.server", "null unless model.adapter is lora, which is what is sent", self.rollout.server
            )
        if self.engine.prefix_dtype != "exact":
            self._can_approximate()
        if self.optim.kind != "adamw" and self.train.parallel == "fsdp":
            raise refuse("optim.kind", "adamw for train.parallel fsdp, which divides its moments", self.optim.kind)
        if self.model.quantize != "none" and self.train.parallel == "fsdp":
            raise refuse("model.quantize", "none for train.parallel fsdp, which divides weights", self.model.quantize)
        if self.checkpoint.best != "none":
            self._can_choose()
        return self

    def _can_approximate(self) -> None:
        """Raise for an `engine.prefix_dtype` of prompts that are not kept: a moving teacher's live for one step."""
        if self.teacher.kind != "frozen":
            raise refuse("engine.prefix_dtype", "exact unless teacher.kind is frozen", self.engine.prefix_dtype)
        if self.engine.teacher_cache == "none" or not self.engine.share_prefix:
            raise refuse("engine.prefix_dtype", "exact without engine.teacher_cache", self.engine.prefix_dtype)

    def _can_choose(self) -> None:
        """Raise for a `checkpoint.best` that nothing is measured for."""
        best = self.checkpoint.best
        if self.data.validation is None:
            raise refuse("checkpoint.best", "none without data.validation, whose rows it goes by", best)
        if self.evaluate.every == 0:
            raise refuse("checkpoint.best", "none without evaluate.every, the steps it chooses among", best)
        if best == "loss" and self.objective.kind == "reward":
            raise refuse("checkpoint.best", "none or accuracy for objective.kind reward", best)
        if best == "loss" and self.train.parallel == "fsdp":  # its processes would need as many passes each
            raise refuse("checkpoint.best", "none or accuracy for train.parallel fsdp", best)
        if best == "loss" and self.rollout.server and self.objective.kind != "sft":
            raise refuse("checkpoint.best", "none or accuracy with rollout.server", best)


__all__ = [
    "TEACHER_TEMPLATE",
    "CheckpointConfig",
    "Config",
    "DataConfig",
    "EngineConfig",
    "EvaluateConfig",
    "LogConfig",
    "MediaConfig",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimConfig",
    "PromptsConfig",
    "RewardsConfig",
    "RolloutConfig",
    "Section",
    "TeacherConfig",
    "TrainConfig",
    "at_home",
    "refuse",
]
