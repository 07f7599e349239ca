"""The lines of a plan, and the keys of the config that move each."""

from __future__ import annotations

from collections.abc import Mapping

WEIGHTS, ADAPTERS, GRADIENTS, MOMENTS, AVERAGE = "weights", "adapter", "gradients", "optimizer", "teacher's weights"
ACTIVATIONS, HEAD, SLOTS = "activations", "head workspace", "KV of rollout slots"
PREFIXES, FEATURES, PROMPTS = "teacher's prefixes", "features of media", "prompts and media"
INPUTS = "layer inputs (host)"

KNOBS = {
    WEIGHTS: "model.dtype, model.quantize with model.adapter=lora",
    ADAPTERS: "model.lora_r, model.lora_targets",
    GRADIENTS: "model.adapter=lora, model.freeze, optim.in_backward",
    MOMENTS: "model.adapter=lora, model.freeze, optim.kind",
    AVERAGE: "teacher.kind=frozen, teacher.lora_average=freeze_a",
    ACTIVATIONS: "engine.token_budget, model.activation_checkpointing",
    HEAD: "objective.workspace_mib",
    SLOTS: "rollout.slots, rollout.max_new_tokens",
    PREFIXES: "engine.teacher_cache, engine.teacher_cache_*_mib",
    FEATURES: "engine.feature_cache_mib",
    PROMPTS: "prompts.cache_mib",
    INPUTS: "engine.token_budget, model.activation_checkpointing",
}
ON_HOST = (INPUTS,)  # beside a device: no part of what has to fit there


def on_device(phase: Mapping[str, int]) -> int:
    """Bytes of a phase that its device has to hold."""
    return sum(size for name, size in phase.items() if name not in ON_HOST)
