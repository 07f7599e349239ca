"""The one resident model: load it, put the adapter on, read its hidden states without running its head."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from opsd.config import ModelConfig
from opsd.errors import InputError

_log = logging.getLogger(__name__)

# Attributes by which a family changes its logits after the head. The loss sees head(hidden) only, so such a
# family would be trained on another distribution than it samples from.
_LOGIT_TRANSFORMS = ("final_logit_softcapping", "logit_scale", "logits_scaling", "lm_head_multiplier")


@dataclass(frozen=True)
class Forward:
    """What one forward pass leaves: no logits, they are formed in chunks by whoever needs them."""

    hidden: Tensor  # (B, S, D) after the final norm
    cache: Any  # transformers Cache, or None
    positions: Tensor | None  # (axes, B, S) as the model computed them, or None where it counts 0, 1, 2, ...


class LanguageModel:
    """A Hugging Face causal model (with or without vision and audio towers), its processor and its head.

    Student, teacher and rollout all run on this one set of weights (architecture.md, decision 1).
    """

    def __init__(self, module: Any, processor: Any, config: ModelConfig):
        self.module = module
        self.processor = processor
        self.config = config
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.device = next(module.parameters()).device
        self.has_adapter = config.adapter == "lora"
        self.end_ids = _end_ids(module, self.tokenizer)
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]

    @property
    def head(self) -> Tensor:
        """(V, D) weight of the output embedding."""
        return self.module.get_output_embeddings().weight

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids a rollout must never sample: every special id but the end tokens (platform.md)."""
        size = self.head.shape[0]
        known = len(self.tokenizer)
        special = {i for i, t in self.tokenizer.added_tokens_decoder.items() if t.special}
        padding = range(known, size)  # rows of a padded vocabulary have no token
        return sorted(i for i in (special | set(padding)) - set(self.end_ids) if i < size)

    def trainable(self) -> dict[str, nn.Parameter]:
        """Trainable parameters by name; a tied parameter appears once."""
        return {name: p for name, p in self.module.named_parameters() if p.requires_grad}

    def forward(self, **inputs: Any) -> Forward:
        """Run the model up to its head. The head is handed zero rows, so no [tokens, vocabulary] tensor exists."""
        seen: dict[str, Tensor | None] = {"positions": None}

        def before_decoder(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen["positions"] = kwargs.get("position_ids")

        def before_head(_: nn.Module, args: tuple[Any, ...]) -> tuple[Tensor]:
            seen["hidden"] = args[0]
            return (args[0][:, :0],)

        base = self.module.get_base_model() if self.has_adapter else self.module
        hooks = [
            base.get_decoder().register_forward_pre_hook(before_decoder, with_kwargs=True),
            base.get_output_embeddings().register_forward_pre_hook(before_head),
        ]
        try:
            with self._autocast():
                output = self.module(**inputs)
        finally:
            for hook in hooks:
                hook.remove()
        positions = seen["positions"]
        if positions is not None:
            positions = positions[None] if positions.ndim == 2 else positions[-3:]
        hidden = seen["hidden"]
        assert hidden is not None
        return Forward(hidden, getattr(output, "past_key_values", None), positions)

    @contextmanager
    def mode(self, train: bool) -> Iterator[None]:
        """Dropout on for the student's update only; restored afterwards, so no pass can switch it off for another."""
        before = self.module.training
        self.module.train(train)
        try:
            yield
        finally:
            self.module.train(before)

    def _autocast(self) -> Any:
        # Full fine-tuning in bf16 keeps fp32 weights: at lr 1e-6 a bf16 weight would not move.
        on = self.config.dtype == "bfloat16" and not self.has_adapter
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)


def load_model(config: ModelConfig, seed: int = 0, adapter_from: Path | None = None) -> LanguageModel:
    """Load model and processor from a folder or a hub id, freeze what the config freezes, add the adapter.

    adapter_from: a saved adapter to continue instead of a fresh one. Raises InputError for a path that holds no
    model, a model without an output head, or one that changes its logits after the head.
    """
    from opsd.processing import load_processor

    hf_config = _read(lambda auto: auto.AutoConfig, config, "a model folder or hub id")
    module = _model_class(hf_config, config)
    dtype = torch.bfloat16 if config.dtype == "bfloat16" and config.adapter == "lora" else torch.float32
    module = module.from_pretrained(config.path, dtype=dtype, attn_implementation=config.attention)
    _check_head(module, config.path)
    _freeze(module, config.freeze)
    if config.adapter == "lora":
        torch.manual_seed(seed)
        module = _add_lora(module, config, adapter_from)
    device = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    module.to(device)
    processor = load_processor(config.path, trust_remote_code=config.trust_remote_code)
    return LanguageModel(module.eval(), processor, config)


def _read(pick: Any, config: ModelConfig, expected: str) -> Any:
    import transformers

    try:
        return pick(transformers).from_pretrained(config.path, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError) as error:
        raise InputError(
            field="model.path", expected=expected, found=f"{config.path!r} ({str(error).splitlines()[0]})"
        ) from error


def _model_class(hf_config: Any, config: ModelConfig) -> Any:
    """The class the checkpoint names; a full Omni checkpoint is opened as its thinker."""
    import transformers

    names = {"Qwen2_5OmniModel", "Qwen2_5OmniForConditionalGeneration"}
    architecture = (hf_config.architectures or ["(none)"])[0]
    if architecture in names:
        architecture = "Qwen2_5OmniThinkerForConditionalGeneration"
    cls = getattr(transformers, architecture, None)
    if cls is None:
        raise InputError(
            field="model.path",
            expected="an architecture known to transformers",
            found=f"{architecture} in {config.path}",
        )
    return cls


def _check_head(module: Any, path: str) -> None:
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        raise InputError(
            field="model.path",
            expected="a model with an output head (a causal language model)",
            found=f"{type(module).__name__} in {path}, which has none",
        )
    if getattr(head, "bias", None) is not None:
        raise InputError(field="model.path", expected="a head without bias", found=f"{type(module).__name__} with one")
    text_config = module.config.get_text_config()
    for name in _LOGIT_TRANSFORMS:
        if getattr(text_config, name, None) not in (None, 1, 1.0):
            raise InputError(
                field="model.path",
                expected="logits that are head(hidden), nothing after it",
                found=f"{type(module).__name__} with {name}={getattr(text_config, name)}",
            )


def _freeze(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    names = [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if not any(name.startswith(prefix) for name in names):
            parts = sorted({".".join(name.split(".")[:1]) for name in names})
            raise InputError(
                field="model.freeze",
                expected=f"a prefix of a parameter name ({', '.join(parts)} ...)",
                found=repr(prefix),
            )
    for name, parameter in module.named_parameters():
        if name.startswith(prefixes):
            parameter.requires_grad_(False)


def _add_lora(module: Any, config: ModelConfig, adapter_from: Path | None) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    if adapter_from is not None:
        return PeftModel.from_pretrained(module, adapter_from, is_trainable=True)
    targets = config.lora_targets if isinstance(config.lora_targets, str) else list(config.lora_targets)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_towers(module) or None,
        task_type="CAUSAL_LM",
    )
    peft_model = get_peft_model(module, lora)
    if type(peft_model.get_base_model().get_output_embeddings()) is not nn.Linear:
        raise InputError(field="model.lora_targets", expected="no adapter on the output head", found=str(targets))
    return peft_model


def _towers(module: Any) -> str:
    """A pattern of everything outside the decoder: perception towers keep their weights under LoRA."""
    decoder = module.get_decoder()
    inside = next((name for name, child in module.named_modules() if child is decoder), "")
    return rf"^(?!{inside}\.).*$" if inside else ""


def _end_ids(module: Any, tokenizer: Any) -> list[int]:
    ids = module.generation_config.eos_token_id if module.generation_config is not None else None
    ids = ids if ids is not None else tokenizer.eos_token_id
    if ids is None:
        raise InputError(
            field="model.path",
            expected="an end-of-sequence token",
            found="none in generation_config or tokenizer",
        )
    return [ids] if isinstance(ids, int) else list(ids)
