"""The one resident model: load it, put the adapter on, read its hidden states without running its head."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opsd.attention import Carried
from opsd.attention_choice import Choice, choose_kernel
from opsd.config import EngineConfig, ModelConfig
from opsd.errors import InputError, explained
from opsd.families import check_prompt, install
from opsd.features import Towers
from opsd.integrations.hf import logit_changes, skip_head
from opsd.liger import use_liger
from opsd.positions import axes, prompt_positions
from opsd.prompts import Prompt

# Checkpoints that speak too are opened as the part that reads and writes text.
_THINKERS = {
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


@dataclass(frozen=True)
class Forward:
    """What one forward pass leaves: no logits, they are formed in chunks by whoever needs them."""

    hidden: Tensor  # (B, S, D) after the final norm
    cache: Any  # transformers Cache, or None
    positions: Tensor | None  # (axes, B, S) as the model computed them, or None where it counts 0, 1, 2, ...


@dataclass
class TokenCount:
    """Tokens that went through the decoder, and those that a padded loop without sharing would have sent."""

    computed: int = 0
    padded: int = 0

    def add(self, computed: int, padded: int) -> None:
        self.computed += computed
        self.padded += padded

    def take(self) -> dict[str, float]:
        """The counts since the last call."""
        counts = {"computed_tokens": float(self.computed), "padded_tokens": float(self.padded)}
        self.computed = self.padded = 0
        return counts


class LanguageModel:
    """A Hugging Face causal model (with or without vision and audio towers), its processor and its head.

    Student, teacher and rollout all run on this one set of weights (architecture.md, decision 1).
    """

    def __init__(
        self, module: Any, processor: Any, processor_files: dict[str, bytes], config: ModelConfig, engine: EngineConfig
    ):
        self.module = module
        self.processor = processor
        self.processor_files = processor_files
        self.config = config
        self.attention: Choice = engine.attention
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.device = next(module.parameters()).device
        self.fused = False  # layers are Liger's
        self.has_adapter = config.adapter == "lora"
        self.towers = Towers(self._base, engine.feature_cache_mib)
        self.end_ids = _end_ids(module, self.tokenizer)
        self.axes = axes(module)
        self.tokens = TokenCount()
        self._positions: WeakKeyDictionary[Prompt, Tensor] = WeakKeyDictionary()
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]

    def check_attention(self) -> None:
        """Choose the kernel of packed rows now, so that one that cannot work is told before the first pass."""
        decoder = self._base.get_decoder().config
        width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        dtype = torch.bfloat16 if self._mixed else self.head.dtype
        choose_kernel(torch.empty(1, 1, 0, width, dtype=dtype, device=self.device), self.attention)

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
        seen: list[Tensor | None] = []

        def before_decoder(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append(kwargs.get("position_ids"))

        hook = self._base.get_decoder().register_forward_pre_hook(before_decoder, with_kwargs=True)
        try:
            with skip_head(self.module) as hidden, self._autocast():
                output = self.module(**inputs)
        finally:
            hook.remove()
        positions = seen[-1]
        if positions is not None:
            positions = positions[None] if positions.ndim == 2 else positions[-3:]
        states = hidden[-1].to(torch.bfloat16) if self._mixed else hidden[-1]  # norms leave autocast in fp32
        return Forward(states, getattr(output, "past_key_values", None), positions)

    def forward_packed(self, ids: Tensor, positions: Tensor, media: dict[str, Tensor], packed: Carried) -> Tensor:
        """States (S, D) of one packed row: ids (1, S), positions (axes, S), media of its prompts in their order."""
        # A mask of four axes is passed on as it is: the row says itself who sees whom.
        no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.device)
        at = positions[:, None] if self.axes > 1 else positions
        with self._autocast():
            if media:
                with skip_head(self.module) as seen:
                    self.module(
                        input_ids=ids, position_ids=at, attention_mask=no_mask, use_cache=False, packed=packed, **media
                    )
                hidden = seen[-1]
            else:  # straight to the decoder: what lies around it only handles media
                decoder = self._base.get_decoder()
                hidden = decoder(
                    input_ids=ids, position_ids=at, attention_mask=no_mask, use_cache=False, packed=packed
                ).last_hidden_state
        return (hidden.to(torch.bfloat16) if self._mixed else hidden)[0]

    def positions(self, prompt: Prompt) -> Tensor:
        """(axes, P) on the host, computed once per prompt."""
        found = self._positions.get(prompt)
        if found is None:
            check_prompt(self._base, prompt.inputs)
            found = self._positions[prompt] = prompt_positions(self._base, prompt.inputs)
        return found

    @contextmanager
    def mode(self, train: bool) -> Iterator[None]:
        """Dropout on for the student's update only; restored afterwards, so no pass can switch it off for another."""
        before = self.module.training
        self.module.train(train)
        try:
            yield
        finally:
            self.module.train(before)

    @property
    def _base(self) -> Any:
        return self.module.get_base_model() if self.has_adapter else self.module

    @property
    def compute(self) -> str:
        """What a forward depends on beside weights and inputs: the dtype it computes in, and whose layers."""
        dtype = "bfloat16" if self._mixed else str(next(self.module.parameters()).dtype)
        return f"{dtype} liger" if self.fused else dtype

    @property
    def _mixed(self) -> bool:
        # Full fine-tuning in bf16 keeps fp32 weights: at lr 1e-6 a bf16 weight would not move.
        return self.config.dtype == "bfloat16" and not self.has_adapter

    def _autocast(self) -> Any:
        return torch.autocast(self.device.type, dtype=torch.bfloat16) if self._mixed else nullcontext()


def load_model(
    config: ModelConfig, seed: int = 0, checkpoint: Path | None = None, engine: EngineConfig | None = None
) -> LanguageModel:
    """Load model and processor from a folder or hub id, freeze what the config freezes, add the adapter.

    seed: of a fresh adapter. checkpoint: a folder with trained weights, or a trained adapter, to take instead of the
    starting ones. engine: how packed rows are computed. Raises InputError for a path that holds no whole model and
    processor, a family the engine does not handle, an output head it cannot use, and for a device, attention,
    adapter or Liger that does not work here.
    """
    from transformers.utils import logging

    from opsd.processing import load_processor, read_processor_files

    logging.disable_progress_bar()  # ours is on the terminal
    lora = config.adapter == "lora"
    source = config.path if checkpoint is None or lora else str(checkpoint)
    module = _read_weights(source, config)
    _check_head(module, source)
    install(module)
    _freeze(module, config.freeze)
    if lora:
        module = _add_lora(module, config, seed, checkpoint)
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError("something left to train", repr(list(config.freeze)), field="model.freeze")
    with explained("a tokenizer, and a processor where the model has media", field="model.path"):
        processor = load_processor(source, trust_remote_code=config.trust_remote_code)
        files = read_processor_files(source)
    with explained("auto, or a device of this machine", field="model.device"):
        module.to(config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu"))
    model = LanguageModel(module.eval(), processor, files, config, engine or EngineConfig())
    model.check_attention()
    model.fused = use_liger(model._base.get_decoder(), config.liger, model.device.type)
    return model


def _read_weights(path: str, config: ModelConfig) -> Any:
    """The model in the class its config names, every weight read; a full Omni checkpoint is opened as its thinker."""
    import transformers

    with explained("a model folder or hub id", field="model.path"):
        hf_config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)
    architecture = (hf_config.architectures or ["(none)"])[0]
    architecture = _THINKERS.get(architecture, architecture)
    cls: Any = getattr(transformers, architecture, object)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or hf_config.is_encoder_decoder:
        found = f"{architecture} in {path}"
        raise InputError("a decoder architecture known to transformers", found, field="model.path")
    with explained("weights that load, and model.attention that they support", field="model.path"):
        module, report = cls.from_pretrained(
            path,
            dtype=torch.bfloat16 if config.dtype == "bfloat16" and config.adapter == "lora" else torch.float32,
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
        )
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"all weights of {architecture}", f"{path} without {names}", field="model.path")
    return module


def _check_head(module: Any, path: str) -> None:
    name = type(module).__name__
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        found = f"{name} in {path}, which has none"
        raise InputError("a model with an output head (a causal language model)", found, field="model.path")
    if getattr(head, "bias", None) is not None:
        raise InputError("an output head without bias", f"{name}, which has one", field="model.path")
    if changes := logit_changes(module):  # the loss would see another distribution than the model samples from
        found = f"{name} with " + ", ".join(f"{key}={value}" for key, value in changes.items())
        raise InputError("logits that are head(hidden), nothing after it", found, field="model.path")


def _freeze(module: nn.Module, prefixes: tuple[str, ...]) -> None:
    """Freeze modules by the beginning of their parameters' names: `visual` or `model.layers.1`, not layers.10."""
    names = [name for name, _ in module.named_parameters()]
    for prefix in prefixes:
        if not any(_is_under(name, prefix) for name in names):
            parts = ", ".join(sorted({name.split(".")[0] for name in names}))
            raise InputError(f"the name of a module or parameter ({parts}, ...)", repr(prefix), field="model.freeze")
    for name, parameter in module.named_parameters():
        if any(_is_under(name, prefix) for prefix in prefixes):
            parameter.requires_grad_(False)


def _is_under(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(prefix.rstrip(".") + ".")


def _add_lora(module: Any, config: ModelConfig, seed: int, checkpoint: Path | None) -> Any:
    from peft import LoraConfig, PeftModel, get_peft_model

    if checkpoint is not None:
        with explained("an adapter of this model", field="--resume"):
            return PeftModel.from_pretrained(module, checkpoint, is_trainable=True)
    every = config.lora_targets == "all-linear"
    targets = _decoder_linear(module) if every else list(config.lora_targets)
    lora = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        exclude_modules=_outside_decoder(module),
        task_type="CAUSAL_LM",
    )
    head = next(name for name, child in module.named_modules() if child is module.get_output_embeddings())
    if isinstance(targets, list) and any(f".{head}".endswith(f".{target}") for target in targets):
        raise InputError("no adapter on the output head", str(targets), field="model.lora_targets")
    torch.manual_seed(seed)
    with explained("names of modules in the decoder", field="model.lora_targets"):
        return get_peft_model(module, lora)


def _decoder_linear(module: Any) -> str:
    """A pattern of every linear layer in the decoder.

    peft's own "all-linear" goes by last names: the `0` in a tower's list of layers would be the decoder's layer 0.
    """
    decoder: Any = module.get_decoder()
    prefix = next(f"{name}." for name, child in module.named_modules() if child is decoder)
    linear = {name.rpartition(".")[2] for name, child in decoder.named_modules() if isinstance(child, nn.Linear)}
    return rf"{re.escape(prefix)}(.*\.)?({'|'.join(sorted(linear))})"


def _outside_decoder(module: Any) -> str | None:
    """A pattern of everything outside the decoder: perception towers keep their weights under LoRA."""
    decoder: Any = module.get_decoder()
    name = next((name for name, child in module.named_modules() if child is decoder), "")
    return rf"^(?!{name}\.).*$" if name else None


def _end_ids(module: Any, tokenizer: Any) -> list[int]:
    ids = module.generation_config.eos_token_id if module.generation_config is not None else None
    ids = ids if ids is not None else tokenizer.eos_token_id
    if ids is None:
        raise InputError("an end-of-sequence token", "none in generation_config or tokenizer", field="model.path")
    ids = [ids] if isinstance(ids, int) else list(ids)
    # the tokenizer's own first: of several ends it is the one that closes a turn
    return sorted(ids, key=lambda i: i != tokenizer.eos_token_id)
