"""The section of the model and what of it is trained."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from opsd.sections.base import Float, Section, Switch, Texts, refuse

Part = Literal["vision", "audio", "projector", "language"]


class ModelConfig(Section):
    path: str = Field(min_length=1, description="Folder or hub id of the model and its processor.")
    dtype: Literal["float32", "bfloat16"] = Field(default="float32", description="Type of the weights.")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1, ...")
    adapter: Literal["none", "lora"] = Field(default="none", description="none trains the weights, lora an adapter.")
    quantize: Literal["none", "nf4"] = Field(
        default="none",
        description="nf4: the language model's linear layers in 4 bits under the adapter (bitsandbytes).",
    )
    lora_r: int = Field(default=16, ge=1, description="Rank of the adapter.")
    lora_alpha: int = Field(default=32, ge=1, description="Scale of the adapter times its rank.")
    lora_dropout: Float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    lora_targets: Literal["all-linear"] | Texts | dict[Part, Literal["all-linear"] | Texts] = Field(
        default="all-linear",
        description="Linear layers of the language part that get an adapter, or for each part: {vision: [qkv, proj]}.",
    )
    freeze: Texts = Field(
        default=(), description="Parts (vision, audio, projector, language) or modules by name that stay as they are."
    )
    attention: str = Field(default="sdpa", description="Attention implementation: sdpa, eager, ...")
    liger: Switch = Field(
        default="auto", description="Liger's fused RMSNorm, RoPE and SwiGLU; auto: on CUDA where it is installed."
    )
    activation_checkpointing: bool | Literal["offload"] = Field(
        default=False,
        description="Keep each layer's input only, compute the rest again in the backward; offload: on the host.",
    )
    trust_remote_code: bool = Field(default=False, description="Run Python code that comes with the model.")

    @model_validator(mode="after")
    def _checks(self) -> ModelConfig:
        if self.quantize != "none" and self.adapter != "lora":
            raise refuse("quantize", "none without model.adapter lora: codes of 4 bits are not trained", self.quantize)
        return self
