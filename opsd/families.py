"""The families whose attention the packed engine computes, and why others are refused."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from opsd import attention
from opsd.errors import InputError

# model_type of the config that the decoder reads. Each is compared with its plain forward in tests/test_families.py.
PACKED = (
    "llama",
    "qwen2",
    "qwen3",
    "gemma3_text",
    "granite",
    "cohere",
    "phi",
    "qwen2_5_vl_text",
    "qwen3_vl_text",
    "qwen2_5_omni_text",
    "qwen3_omni_moe_text",
)


def install(module: Any) -> None:
    """Let the decoder attend through opsd.attention; its towers keep theirs. Raises InputError, by name, otherwise.

    A forward that carries no packed row (generate, the plain twin) is SDPA as before.
    """
    name = type(module).__name__
    if reason := _refusal(module):
        families = ", ".join(kind.removesuffix("_text") for kind in PACKED)
        raise InputError(f"one of the families {families}", f"{name}: {reason}", field="model.path")
    attention.register()
    module.get_decoder().config._attn_implementation = attention.NAME


def check_prompt(module: Any, inputs: Mapping[str, Any]) -> None:
    """Raise InputError for media that make a family's attention other than causal."""
    if module.config.model_type == "gemma3" and "pixel_values" in inputs:
        name = type(module).__name__
        raise InputError(f"text only for {name}, whose images attend in both directions", "an image", field="prompt")


def _refusal(module: Any) -> str | None:
    """Why a packed row would be computed wrongly, or None."""
    if getattr(module, "_is_stateful", False):
        return "it carries a state from token to token, not only keys and values"
    config = module.get_decoder().config
    if any(name.endswith(".sinks") for name, _ in module.named_parameters()):
        return "its attention has sinks"
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"its layers have {', '.join(sorted(other))}"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "its attention scores have a softcap"
    if getattr(config, "attention_dropout", 0.0):
        return f"it has attention dropout ({config.attention_dropout}), which the packed row does not draw"
    if getattr(config, "use_bidirectional_attention", False):
        return "its attention is not causal"
    if other := _rope_types(config) & {"dynamic", "longrope"}:
        return f"its rotary frequencies change with the longest position of a row ({other.pop()})"
    if config.model_type not in PACKED:
        return f"a decoder of type {config.model_type}, which nobody has compared with its plain forward"
    return None


def _rope_types(config: Any) -> set[str]:
    """Of all layers: a config has one set of parameters, or one for each kind of layer."""
    parameters = getattr(config, "rope_parameters", None) or {}
    return {
        one["rope_type"] for one in (parameters, *parameters.values()) if isinstance(one, dict) and "rope_type" in one
    }
