"""What a run can be told: one frozen section per module that reads it. `opsd.config` reads and writes them.

Units and letters are those of the project: G responses per prompt, steps are optimizer updates.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

TEACHER_TEMPLATE = (
    "Evidence from an observer of this clip (may be incomplete):\n{rationale}\n"
    "Use this evidence together with what you see and hear. Reason in your own words, then answer."
)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-4 as text: a float written that way is a float all the same."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _switch(value: Any) -> Any:
    """YAML 1.1 reads on and off as booleans."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _refuse(field: str, expected: str, found: object) -> PydanticCustomError:
    """The error of a check; `opsd.config` adds file and line. `field` is the key within the section."""
    return PydanticCustomError("check", "{expected}", {"field": field, "expected": expected, "found": repr(found)})


def at_home(path: Path) -> Path:
    """`~` and `~name` resolved; a name nobody has stays as it is, and will be said not to exist."""
    try:
        return path.expanduser()
    except RuntimeError:
        return path


Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Temperature = Annotated[Float, Field(ge=1e-6, le=1e6)]  # fp32 logits divided by less, or by more, are not numbers
Switch = Annotated[Literal["auto", "on", "off"], BeforeValidator(_switch)]
Texts = Annotated[tuple[str, ...], Field(strict=False)]
Local = Annotated[Path, Field(strict=False), AfterValidator(lambda path: at_home(path).absolute())]


class Section(BaseModel):
    """Unknown keys are errors, no value is coerced in silence, and a section does not change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)


class DataConfig(Section):
    train: Local | None = Field(default=None, description="Rows to train on (JSONL).")
    test: Local | None = Field(default=None, description="Held-out rows for the final evaluation.")
    validation: Local | None = Field(default=None, description="Held-out rows for evaluations during training.")
    labels: Texts | None = Field(default=None, description="The options: every row's label must be one of them.")
    require_rationale: bool = Field(default=True, description="Refuse training rows without a rationale.")

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (not labels or any(not label.strip() for label in labels)):
            raise _refuse("labels", "a list of non-empty labels, or null", list(labels))
        if labels is not None and len(set(labels)) < len(labels):
            raise _refuse("labels", "labels that differ", list(labels))
        return labels


class PromptsConfig(Section):
    system: str | None = Field(default=None, description="System message put before prompts that have none.")
    subtitle_template: str | None = Field(
        default='Subtitle: "{subtitle}"', description="Text for a row's subtitle; null leaves subtitles out."
    )
    teacher_template: str = Field(
        default=TEACHER_TEMPLATE, description="Text of the teacher's view with {rationale} in it."
    )
    label_template: str = Field(
        default="The correct answer is: {label}\nReason in your own words, then answer.",
        description="Text of the teacher's view when privilege is label.",
    )
    privilege: Literal["rationale", "label", "none"] = Field(
        default="rationale", description="What the teacher sees that the student does not."
    )
    max_prompt_tokens: int = Field(
        default=24576, ge=1, description="Longer prompts are an error, never truncated (tokens)."
    )
    verify: bool = Field(default=True, description="Build every prompt, media decoded, before the first step.")
    cache_mib: int = Field(
        default=512, ge=0, description="Host memory for rendered prompts and their media (MiB); 0 keeps none."
    )

    @model_validator(mode="after")
    def _slots(self) -> PromptsConfig:
        for field, slot in (
            ("teacher_template", "{rationale}"),
            ("label_template", "{label}"),
            ("subtitle_template", "{subtitle}"),
        ):
            template = getattr(self, field)
            if template is not None and slot not in template:
                raise _refuse(field, f"a template that contains {slot}", template)
        return self


class MediaConfig(Section):
    sampling_rate: int = Field(default=16000, ge=1, description="Audio is resampled to this rate (Hz).")


class ModelConfig(Section):
    path: str = Field(min_length=1, description="Folder or hub id of the model and its processor.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the weights.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")
    adapter: Literal["none", "lora"] = Field(default="none", description="none trains the weights, lora an adapter.")
    lora_r: int = Field(default=16, ge=1, description="Rank of the adapter.")
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the adapter times its rank.")
    lora_dropout: Float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    lora_targets: Literal["all-linear"] | Texts = Field(
        default="all-linear", description="Modules that get an adapter."
    )
    freeze: Texts = Field(default=(), description="Name prefixes of modules that stay as they are.")
    attention: str = Field(default="sdpa", description="Attention implementation: sdpa, eager, ...")
    liger: Switch = Field(
        default="auto", description="Liger's fused RMSNorm, RoPE and SwiGLU; auto: on CUDA where it is installed."
    )
    activation_checkpointing: bool = Field(
        default=False,
        description="Keep each layer's input only, compute the rest again in the backward.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")


class EngineConfig(Section):
    share_prefix: bool = Field(
        default=True, description="Compute a prompt once for its G responses; false is the plain twin."
    )
    token_budget: int = Field(
        default=8192,
        ge=1,
        description="Micro-batch: most tokens of a forward pass; a single response with its prompt may be more.",
    )
    teacher_cache: Literal["none", "memory", "disk"] = Field(
        default="memory", description="Where the teacher's prefixes are kept; disk is memory and disk, for later runs."
    )
    teacher_cache_device_mib: int = Field(
        default=1024, ge=0, description="Device memory for them (MiB); on a CPU only the host's counts."
    )
    teacher_cache_host_mib: int = Field(default=4096, ge=0, description="Host memory for them (MiB).")
    teacher_cache_disk_mib: int = Field(default=32768, ge=0, description="Disk for them, of all runs together (MiB).")
    teacher_cache_dir: Local = Field(
        default=Path("runs/cache/teacher"), description="Their folder on disk, which runs may share."
    )
    feature_cache_mib: int = Field(
        default=512, ge=0, description="Device memory for what frozen towers gave for media (MiB); 0 keeps none."
    )
    attention: Literal["auto", "flash_attn", "flash", "dense"] = Field(
        default="auto",
        description="Kernel of packed rows: flash_attn's, torch's own, or the plain definition; auto chooses.",
    )


class RolloutConfig(Section):
    group_size: int = Field(default=4, ge=1, description="G, responses sampled per prompt.")
    max_new_tokens: int = Field(default=512, ge=1, le=1 << 20, description="Longest response (tokens).")
    temperature: Temperature = Field(default=1.0, description="Sampling temperature.")
    top_k: int | None = Field(default=None, ge=1, description="Sample among the k likeliest tokens; null keeps all.")
    top_p: Float = Field(default=1.0, gt=0, le=1, description="Nucleus sampling; 1 keeps the whole distribution.")
    min_p: Float = Field(
        default=0.0, ge=0, le=1, description="Leave out tokens below this share of the likeliest; 0 keeps all."
    )
    stop: Texts = Field(
        default=(), description="Strings that end a response when its text, without special tokens, contains one."
    )
    slots: int = Field(
        default=64, ge=1, description="Responses decoded at a time; the next takes a finished one's slot."
    )
    graphs: bool = Field(default=True, description="Capture decode steps in CUDA graphs; nothing changes on a CPU.")

    @field_validator("stop")
    @classmethod
    def _stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text or "\ufffd" in text for text in stop):  # U+FFFD is what an unfinished character decodes to
            raise _refuse("stop", "a list of strings that are not empty and have no U+FFFD", list(stop))
        return stop


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
    beta: Float = Field(default=0.5, description="Teacher's weight in the JSD mixture, strictly between 0 and 1.")
    temperature: Temperature = Field(default=1.0, description="Temperature of both distributions.")
    alpha: Float = Field(
        default=0.0, ge=0, description="Weight of the reward term beside distillation; 0 leaves it out."
    )
    workspace_mib: int = Field(default=1200, ge=1, description="Memory for logits of one chunk (MiB).")
    backend: Literal["auto", "triton", "native", "torch"] = Field(
        default="auto", description="Row kernels of the loss."
    )
    teacher_view_fraction: Float = Field(default=0.0, ge=0, le=1, description="sft: share of rows seen with privilege.")

    @model_validator(mode="after")
    def _checks(self) -> ObjectiveConfig:
        if self.divergence == "jsd" and not 0 < self.beta < 1:
            raise _refuse("beta", "a number strictly between 0 and 1 for divergence jsd", self.beta)
        if self.alpha and self.kind != "distill":
            raise _refuse("alpha", f"0 for objective.kind {self.kind}", self.alpha)
        if self.teacher_view_fraction and self.kind != "sft":
            raise _refuse("teacher_view_fraction", f"0 for objective.kind {self.kind}", self.teacher_view_fraction)
        return self


class RewardsConfig(Section):
    accuracy: Float = Field(default=1.0, description="Weight of the right answer.")
    format: Float = Field(default=1.0, description="Weight of <think>..</think><answer>..</answer>.")


class OptimConfig(Section):
    lr: Float = Field(default=1e-6, ge=0, description="Peak learning rate of AdamW.")
    betas: Annotated[tuple[Float, Float], Field(strict=False)] = Field(
        default=(0.9, 0.999), description="AdamW decays."
    )
    eps: Float = Field(default=1e-8, gt=0, description="AdamW epsilon.")
    weight_decay: Float = Field(default=0.0, ge=0, description="Decoupled weight decay.")
    max_grad_norm: Float | None = Field(default=1.0, gt=0, description="Clip the gradient's norm; null does not clip.")
    schedule: Literal["constant", "linear", "cosine"] = Field(default="constant", description="After the warm-up.")
    warmup_steps: int = Field(default=0, ge=0, description="Steps of linear warm-up.")

    @field_validator("betas", mode="before")
    @classmethod
    def _pair(cls, betas: Any) -> Any:
        if not isinstance(betas, list | tuple) or len(betas) != 2:
            raise _refuse("betas", "a list of two numbers", betas)
        return betas

    @field_validator("betas")
    @classmethod
    def _betas(cls, betas: tuple[float, float]) -> tuple[float, float]:
        if not all(0 <= beta < 1 for beta in betas):
            raise _refuse("betas", "two numbers in [0, 1)", list(betas))
        return betas


class CheckpointConfig(Section):
    every: int = Field(default=0, ge=0, description="Steps between checkpoints; 0 writes one at the end only.")
    keep: int = Field(default=2, ge=1, description="Checkpoints kept, the newest ones.")


class LogConfig(Section):
    every: int = Field(default=1, ge=1, description="Steps between lines of metrics.jsonl.")
    samples_every: int = Field(default=20, ge=0, description="Steps between sampled responses; 0 writes none.")
    samples: int = Field(default=4, ge=0, description="Responses written each time.")
    progress: Literal["auto", "rich", "plain", "none"] = Field(default="auto", description="auto: rich on a terminal.")


class EvaluateConfig(Section):
    every: int = Field(default=0, ge=0, description="Steps between evaluations; 0 evaluates before and after only.")
    batch_size: int = Field(default=32, ge=1, description="Prompts decoded together.")
    limit: int | None = Field(default=None, ge=1, description="Use the first rows only; null uses all.")
    teacher: bool = Field(default=True, description="Also measure the teacher's view.")


class TrainConfig(Section):
    steps: int = Field(default=100, ge=0, description="Optimizer updates.")
    prompts_per_step: int = Field(default=8, ge=1, description="Prompts per update, over all micro-batches.")
    seed: int = Field(default=0, ge=0, lt=1 << 32, description="Seed of data order, sampling and initialisation.")
    run_dir: Local | None = Field(
        default=None, description="Folder of the run; null takes the next free runs/<name>-NNN."
    )
    threads: int | None = Field(default=None, ge=1, description="CPU threads; null leaves torch's choice.")


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
            raise _refuse("rollout.group_size", "at least 2 for objective.kind reward, which compares responses", 1)
        if self.teacher.lora_average != "dense" and self.model.adapter != "lora":
            raise _refuse("teacher.lora_average", "dense when model.adapter is not lora", self.teacher.lora_average)
        return self
