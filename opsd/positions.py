"""Positions of a prompt's tokens: 0, 1, 2, ... on one axis, or the family's own on three (time, height, width)."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor


def axes(module: Any) -> int:
    """3 for families with multimodal RoPE, else 1."""
    parameters = getattr(module.config.get_text_config(), "rope_parameters", None) or {}
    return 3 if "mrope_section" in parameters else 1


def prompt_positions(module: Any, inputs: dict[str, Tensor]) -> Tensor:  # (axes, P), on the host
    """The positions the model itself would compute for this prompt alone.

    inputs: what the processor returned for one prompt. Responses go on from the largest position of any axis, plus 1.
    int64; fp32 in Qwen3-Omni, whose videos stand at fractions.
    """
    length = inputs["input_ids"].shape[1]
    plain = torch.arange(length).expand(axes(module), -1)
    if len(plain) == 1 or not any(name.endswith("_grid_thw") for name in inputs):
        return plain
    rope = _owner(module).get_rope_index
    known = dict(inputs)
    if "feature_attention_mask" in inputs:
        known["audio_seqlens"] = inputs["feature_attention_mask"].sum(-1)
    if "video_second_per_grid" in inputs:
        known["second_per_grids"] = inputs["video_second_per_grid"]
    takes = inspect.signature(rope).parameters
    positions, _ = rope(**{name: value for name, value in known.items() if name in takes})
    return positions[:, 0]


def _owner(module: Any) -> Any:
    """The part of the model that knows its rotary positions."""
    return module if hasattr(module, "get_rope_index") else module.model
