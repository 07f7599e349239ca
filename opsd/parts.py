"""The parts of a model: vision, audio, projector, language. What `model.freeze` stills, and what is left to train."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from opsd.errors import InputError, did_you_mean

LANGUAGE = "language"
# By the model_type of the config: how the names of a part's modules begin. A name belongs to the longest beginning that
# fits it, which takes projectors out of the towers they lie in; what fits none is language.
PARTS: dict[str, dict[str, tuple[str, ...]]] = {
    "qwen2_5_vl": {"vision": ("model.visual",), "projector": ("model.visual.merger",)},
    "qwen3_vl": {
        "vision": ("model.visual",),
        "projector": ("model.visual.merger", "model.visual.deepstack_merger_list"),
    },
    "qwen2_5_omni_thinker": {
        "vision": ("visual",),
        "audio": ("audio_tower",),
        "projector": ("visual.merger", "audio_tower.proj"),
    },
    "qwen3_omni_moe_thinker": {
        "vision": ("visual",),
        "audio": ("audio_tower",),
        "projector": ("visual.merger", "visual.merger_list", "audio_tower.proj1", "audio_tower.proj2"),
    },
    "gemma3": {"vision": ("model.vision_tower",), "projector": ("model.multi_modal_projector",)},
}


def parts_of(module: Any) -> tuple[str, ...]:
    """The parts this model has."""
    return (*PARTS.get(module.config.model_type, {}), LANGUAGE)


def part_of(module: Any, name: str) -> str:
    """The part of a module or parameter of this name."""
    table = PARTS.get(module.config.model_type, {})
    fitting = [(len(start), part) for part, starts in table.items() for start in starts if is_under(name, start)]
    return max(fitting)[1] if fitting else LANGUAGE


def is_under(name: str, start: str) -> bool:
    """Whether a dotted name is `start` or lies in it: model.layers.1 has no layers.10."""
    return name == start or name.startswith(start.rstrip(".") + ".")


def is_chosen(module: Any, name: str, chosen: Iterable[str]) -> bool:
    """Whether a module or parameter of this name lies in one of the parts, or under one of the names."""
    return any(part_of(module, name) == one or is_under(name, one) for one in chosen)


def freeze(module: Any, chosen: Iterable[str]) -> None:
    """Freeze parts, and modules or parameters by the beginnings of their names. InputError for what is neither."""
    parameters = dict(module.named_parameters())
    for one in chosen:
        doomed = [p for name, p in parameters.items() if is_chosen(module, name, [one])]
        if not doomed:
            parts, tops = parts_of(module), sorted({name.split(".")[0] for name in parameters})
            expected = f"a part ({', '.join(parts)}) or the name of a module or parameter ({', '.join(tops)}, ...)"
            hint = did_you_mean(one, [*parts, *tops])
            raise InputError(expected, f"{one!r} for {type(module).__name__}", field="model.freeze", hint=hint)
        for parameter in doomed:
            parameter.requires_grad_(False)


def what_trains(module: Any) -> str:
    """One line: how many parameters of each part are trained, and how many stay as they are."""
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    counts: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    for name, parameter in base.named_parameters():
        state = getattr(parameter, "quant_state", None)  # of codes, two in a byte
        count = parameter.numel() if state is None else state.shape.numel()
        counts[part_of(base, name)][not parameter.requires_grad] += count
    told = (f"{part} {trained:,} trained, {still:,} frozen" for part, (trained, still) in counts.items())
    return f"parameters{'' if base is module else ' (LoRA)'}: {'; '.join(told)}"
