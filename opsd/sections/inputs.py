"""Sections of what is learnt from: rows, prompts, media."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator

from opsd.sections.base import Local, Section, Texts, refuse

TEACHER_TEMPLATE = (
    "Evidence from an observer of this clip (may be incomplete):\n{rationale}\n"
    "Use this evidence together with what you see and hear. Reason in your own words, then answer."
)


class DataConfig(Section):
    train: Local | None = Field(default=None, description="Rows to train on (JSONL).")
    test: Local | None = Field(default=None, description="Held-out rows for the final evaluation.")
    validation: Local | None = Field(default=None, description="Held-out rows for evaluations during training.")
    labels: Texts | None = Field(default=None, description="The options: every row's label must be one of them.")
    require_rationale: bool = Field(default=True, description="Refuse training rows without a rationale.")

    on_error: Literal["fail", "skip"] = Field(
        default="fail",
        description="A file that does not decode: end, or leave its row out, say so and count it.",
    )

    @field_validator("labels")
    @classmethod
    def _labels(cls, labels: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if labels is not None and (not labels or any(not label.strip() for label in labels)):
            raise refuse("labels", "a list of non-empty labels, or null", list(labels))
        if labels is not None and len(set(labels)) < len(labels):
            raise refuse("labels", "labels that differ", list(labels))
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
                raise refuse(field, f"a template that contains {slot}", template)
        return self


class MediaConfig(Section):
    sampling_rate: int = Field(default=16000, ge=1, description="Audio is resampled to this rate (Hz).")
    frames: int = Field(default=8, ge=1, le=16, description="Frames of a video, from the middles of equal parts of it.")
    min_pixels: int | None = Field(
        default=None, ge=1, description="Smaller frames of a video are enlarged; null: the model's processor decides."
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Larger frames of a video are reduced; null: the model's processor decides."
    )
    workers: int = Field(
        default=2, ge=0, description="Threads that build the next step's prompts; 0 builds them when they are needed."
    )
    decoded_mib: int = Field(
        default=256, ge=0, description="Host memory for decoded media that the next prompt may need again (MiB)."
    )

    @model_validator(mode="after")
    def _pixels(self) -> MediaConfig:
        if self.min_pixels is not None and self.max_pixels is not None and self.min_pixels > self.max_pixels:
            raise refuse("max_pixels", f"at least media.min_pixels, {self.min_pixels}", self.max_pixels)
        return self
