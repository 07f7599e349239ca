"""Liger's fused layers in the language model: RMSNorm, rotary positions, SwiGLU. Not its losses, and not in the towers.

`model.liger`: auto takes them on CUDA where liger-kernel is installed, on insists, off leaves the model's own. Modules
of this one model are bound to Liger's functions, rather than patched as Liger's own `apply_` functions do: those know
neither Omni family, and patch names that this line of transformers no longer has.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from importlib import util
from typing import Any

from torch import Tensor

from opsd.errors import InputError
from opsd.say import say_once

# By the model_type of the decoder's config: added to the weight of an RMSNorm, and when the product is rounded.
NORMS = {
    "llama": (0.0, "llama"),
    "qwen2": (0.0, "llama"),
    "qwen3": (0.0, "llama"),
    "gemma3_text": (1.0, "gemma"),
    "qwen2_5_vl_text": (0.0, "llama"),
    "qwen3_vl_text": (0.0, "llama"),
    "qwen2_5_omni_text": (0.0, "llama"),
    "qwen3_omni_moe_text": (0.0, "llama"),
}
_ROTATE = "apply_rotary_pos_emb"  # q, k, cos, sin: axes are already mixed in cos and sin


def use_liger(decoder: Any, choice: str, device_type: str) -> bool:
    """Apply the choice to a decoder, and say once what it came to. Raises InputError where `on` cannot be."""
    problem = _problem(decoder, device_type)
    if choice == "on" and problem is not None:
        raise InputError("a model that liger-kernel can compute", problem, field="model.liger", hint="auto chooses")
    if choice == "off" or problem is not None:
        _rotate_with(decoder, None, device_type)
        say_once("layers of the language model: transformers'" + (f" ({problem})" if choice != "off" else ""))
        return False
    replaced = bind(decoder, device_type)
    say_once("layers of the language model: Liger's " + ", ".join(f"{name} ({n})" for name, n in replaced.items()))
    return True


def bind(decoder: Any, device_type: str) -> dict[str, int]:
    """Bind the decoder's layers to Liger's functions; how many of each kind."""
    from liger_kernel.transformers.functional import liger_rms_norm, liger_rope, liger_swiglu

    config = decoder.config
    offset, casting = NORMS[config.model_type]
    silu = getattr(config, "hidden_act", None) in ("silu", "swish")
    counts = {"RMSNorm": 0, "RoPE": len(decoder.layers), "SwiGLU": 0}
    for module in decoder.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = partial(_norm, module, liger_rms_norm, offset, casting)
            counts["RMSNorm"] += 1
        elif silu and all(hasattr(module, name) for name in ("gate_proj", "up_proj", "down_proj", "act_fn")):
            module.forward = partial(_mlp, module, liger_swiglu)
            counts["SwiGLU"] += 1
    _rotate_with(decoder, liger_rope, device_type)
    return {name: count for name, count in counts.items() if count}


def _problem(decoder: Any, device_type: str) -> str | None:
    if device_type != "cuda":
        return f"the model is on {device_type}"
    if util.find_spec("liger_kernel") is None:
        return "liger-kernel is not installed: opsd-trainer[cuda] brings it"
    if decoder.config.model_type not in NORMS:
        return f"a decoder of type {decoder.config.model_type}"
    return None


def _norm(module: Any, rms_norm: Callable[..., Tensor], offset: float, casting: str, x: Tensor) -> Tensor:
    eps = getattr(module, "variance_epsilon", None) or module.eps
    return rms_norm(x, module.weight, eps, offset, casting, in_place=False)


def _mlp(module: Any, swiglu: Callable[..., Tensor], x: Tensor) -> Tensor:
    return module.down_proj(swiglu(module.gate_proj(x), module.up_proj(x)))


def _rotate_with(decoder: Any, rope: Callable[..., Any] | None, device_type: str) -> None:
    """Attention calls a function of its modeling file, which all models of a family share: the last one loaded says
    how tensors on its kind of device are rotated. None: as the file does."""
    modeling: Any = sys.modules[type(decoder).__module__]
    own = getattr(modeling, _ROTATE)
    own = getattr(own, "opsd_own", own)

    def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1) -> tuple[Tensor, Tensor]:
        if rope is None or q.device.type != device_type or unsqueeze_dim != 1:
            return own(q, k, cos, sin, unsqueeze_dim=unsqueeze_dim)
        return rope(q, k, cos, sin)

    rotate.opsd_own = own  # type: ignore[attr-defined]
    setattr(modeling, _ROTATE, own if rope is None else rotate)
