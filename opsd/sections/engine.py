"""Sections of the passes: how they are packed and cached, and how responses are sampled."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator

from opsd.sections.base import Float, Local, Section, Temperature, Texts, refuse


class EngineConfig(Section):
    share_prefix: bool = Field(
        default=True, description="Compute a prompt once for its G responses; false is the plain twin."
    )
    token_budget: Annotated[int, Field(ge=1)] | Literal["auto"] = Field(
        default=8192,
        description="Micro-batch: most tokens of a forward pass; a single response with its prompt may be more. "
        "auto: as many as fit.",
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
    prefix_dtype: Literal["exact", "int8", "fp8"] = Field(
        default="exact",
        description="Keys and values of a frozen teacher's kept prompts: exact, or approximated in one byte each.",
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
    server: str | None = Field(
        default=None,
        description="URL of a vLLM server, http://host:8000/v1, that samples instead, with the student's adapter.",
    )
    server_folder: Local | None = Field(
        default=None, description="Where adapters are written for it; null takes the run's folder, for one machine."
    )
    graphs: bool = Field(default=True, description="Capture decode steps in CUDA graphs; nothing changes on a CPU.")

    @field_validator("stop")
    @classmethod
    def _stop(cls, stop: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text or "\ufffd" in text for text in stop):  # U+FFFD is what an unfinished character decodes to
            raise refuse("stop", "a list of strings that are not empty and have no U+FFFD", list(stop))
        return stop
