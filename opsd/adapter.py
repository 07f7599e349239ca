"""The LoRA adapter of a config: which linear layers get one, named so that plain peft finds the same."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from opsd.config import ModelConfig
from opsd.errors import InputError, explained
from opsd.four_bit import is_coded
from opsd.parts import LANGUAGE, is_chosen, part_of, parts_of
from opsd.say import say_once

_FIELD = "model.lora_targets"


def add_lora(module: Any, config: ModelConfig, seed: int, checkpoint: Path | None) -> Any:
    """The model with a fresh adapter drawn from the seed, or with the trained one of a checkpoint folder."""
    from peft import LoraConfig, PeftModel, get_peft_model

    if checkpoint is not None:
        with explained("an adapter of this model", field="--resume"):
            return PeftModel.from_pretrained(module, checkpoint, is_trainable=True)
    targets = config.lora_targets
    chosen = [
        name
        for part, wanted in (targets if isinstance(targets, dict) else {LANGUAGE: targets}).items()
        for name in _layers(module, part, wanted, config.freeze)
    ]
    if not chosen:
        raise InputError("linear layers for an adapter", str(targets), field=_FIELD)
    _say_what_is_left(module)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=chosen,  # whole names: a last name, or a pattern cut down to them, would reach into the towers
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(seed)
    with explained("layers that peft can adapt", field=_FIELD):
        adapted = get_peft_model(module, lora)
    found = {name for name, child in adapted.get_base_model().named_modules() if hasattr(child, "lora_A")}
    if found != set(chosen):  # in mixtures of experts peft takes some names for those of fused parameters
        raise InputError("layers that peft adapts by name", ", ".join(sorted(found ^ set(chosen))), field=_FIELD)
    return adapted


@contextmanager
def without_adapter(module: Any) -> Iterator[None]:
    """Inside, the base model answers. peft's own `disable_adapter` asks every layer first: 2,000 modules of a 7B."""
    module.base_model.disable_adapter_layers()
    try:
        yield
    finally:
        module.base_model.enable_adapter_layers()


def _layers(module: Any, part: str, wanted: str | Iterable[str], frozen: Iterable[str]) -> list[str]:
    """Names of the linear layers of a part that get an adapter: all, or those with the wanted last names."""
    if part not in parts_of(module):
        expected = f"a part of {type(module).__name__} ({', '.join(parts_of(module))})"
        raise InputError(expected, repr(part), field=_FIELD)
    inside = {name: child for name, child in module.named_modules() if part_of(module, name) == part}
    head = module.get_output_embeddings()
    linear = {name: child for name, child in inside.items() if isinstance(child, nn.Linear) and child is not head}
    if wanted != "all-linear":
        for target in wanted:
            _check_target(target, part, inside, linear, head)
        linear = {n: c for n, c in linear.items() if any(f".{n}".endswith(f".{target}") for target in wanted)}
    free = [name for name, child in linear.items() if not _is_held(module, name, child, frozen)]
    if linear and not free:
        raise InputError(f"layers of {part} that model.freeze does not hold", "none", field=_FIELD)
    return free


def _is_held(module: Any, name: str, layer: nn.Linear, frozen: Iterable[str]) -> bool:
    """Whether a layer is frozen; codes never need a gradient, so there the names tell."""
    return is_chosen(module, f"{name}.weight", frozen) if is_coded(layer) else not layer.weight.requires_grad


def _check_target(
    target: str, part: str, inside: dict[str, nn.Module], linear: dict[str, nn.Linear], head: nn.Module
) -> None:
    """Some linear layer must have this name, which is not the output head's; a convolution beside it is left alone."""
    named = {name: child for name, child in inside.items() if f".{name}".endswith(f".{target}")}
    if any(child is head for child in named.values()):
        raise InputError("no adapter on the output head", repr(target), field=_FIELD)
    if not named.keys() & linear.keys():
        choices = ", ".join(sorted({name.rpartition(".")[2] for name in linear}))
        kinds = ", ".join(sorted({type(child).__name__ for child in named.values()}))
        found = f"{target!r}, which is {kinds}" if named else repr(target)
        raise InputError(f"names of linear layers in {part} ({choices})", found, field=_FIELD)


def _say_what_is_left(module: Any) -> None:
    """Experts that are one tensor for all of a layer are no linear layers."""
    experts = [p.numel() for name, p in module.named_parameters() if ".experts." in name and p.ndim == 3]
    if experts:
        say_once(
            f"no adapter on the experts: they are 3-D parameters ({sum(experts):,}), LoRA adapts linear layers; "
            "model.adapter=none trains them"
        )
