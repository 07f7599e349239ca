"""The one resident model: its hidden states without running its head, padded or packed. loading.py opens it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from opsd.attention import Carried
from opsd.attention_choice import Choice, choose_kernel
from opsd.attention_kernels import Kernel
from opsd.autocast import autocast
from opsd.config import EngineConfig, ModelConfig
from opsd.errors import InputError
from opsd.families import check_prompt
from opsd.features import Towers
from opsd.integrations.hf import output_head, skip_head
from opsd.positions import axes, prompt_positions
from opsd.prompts import Prompt
from opsd.sharding import Shards, on_host
from opsd_kernels import Head


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
        self.attention: Choice | Kernel = engine.attention
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.device = next(module.parameters()).device
        self.fused = False  # layers are Liger's
        self.shards: Shards | None = None  # of a model that is divided among processes
        self.has_adapter = config.adapter == "lora"
        self.towers = Towers(self._base, engine.feature_cache_mib)
        self.end_ids = _end_ids(module, self.tokenizer)
        self.axes = axes(module)
        self.tokens = TokenCount()
        self._positions: WeakKeyDictionary[Prompt, Tensor] = WeakKeyDictionary()
        self.pad_id = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else self.end_ids[0]

    def check_attention(self) -> str:
        """The name of the kernel of packed rows, chosen now: one that cannot work is told before the first pass."""
        decoder = self._base.get_decoder().config
        width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        dtype = torch.bfloat16 if self.mixed else self.head.weight.dtype
        return choose_kernel(torch.empty(1, 1, 0, width, dtype=dtype, device=self.device), self.attention).name

    @property
    def head(self) -> Head:
        """The output embedding, weight (V, D), and what the family does to its logits."""
        return output_head(self.module)

    @property
    def suppressed_ids(self) -> list[int]:
        """Ids a rollout must never sample: every special id but the end tokens (platform.md)."""
        size = len(self.head.weight)
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
                output = self._base(**inputs)
        finally:
            hook.remove()
        positions = seen[-1]
        if positions is not None:
            positions = positions[None] if positions.ndim == 2 else positions[-3:]
        states = hidden[-1].to(torch.bfloat16) if self.mixed else hidden[-1]  # norms leave autocast in fp32
        return Forward(states, getattr(output, "past_key_values", None), positions)

    def forward_packed(self, ids: Tensor, positions: Tensor, media: dict[str, Tensor], packed: Carried) -> Tensor:
        """States (S, D) of one packed row: ids (1, S), positions (axes, S), media of its prompts in their order."""
        # A mask of four axes is passed on as it is: the row says itself who sees whom.
        no_mask = torch.empty(1, 1, 0, 0, dtype=torch.bool, device=self.device)
        at = positions[:, None] if self.axes > 1 else positions
        with self._autocast():
            if media or self.shards is not None:  # units are gathered by the forward of the whole
                with skip_head(self.module) as seen:
                    self._base(
                        input_ids=ids, position_ids=at, attention_mask=no_mask, use_cache=False, packed=packed, **media
                    )
                hidden = seen[-1]
            else:  # straight to the decoder: what lies around it only handles media
                decoder = self._base.get_decoder()
                hidden = decoder(
                    input_ids=ids, position_ids=at, attention_mask=no_mask, use_cache=False, packed=packed
                ).last_hidden_state
        return (hidden.to(torch.bfloat16) if self.mixed else hidden)[0]

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
        if before == train:  # a thousand modules need not be told again
            yield
            return
        self.module.train(train)
        try:
            yield
        finally:
            self.module.train(before)

    def divide(self) -> None:
        """Keep this process's slices of the weights only (FSDP2). Before anything holds on to a parameter."""
        self.shards = Shards(self._base, self.device, self.mixed)

    def weights(self) -> dict[str, Tensor] | None:
        """Every weight of a divided model, whole and in host memory; None where the module has them as they are."""
        if self.shards is None:
            return None
        named = self._base.state_dict(keep_vars=True)
        found = {id(x): on_host(x).cpu() for x in named.values()}  # tied weights stay one tensor
        return {name: found[id(x)] for name, x in named.items()}

    def gathered(self) -> AbstractContextManager[None]:
        """Inside, every weight is whole."""
        return self.shards.gathered() if self.shards is not None else nullcontext()

    @property
    def _base(self) -> Any:
        return self.module.get_base_model() if self.has_adapter else self.module

    @property
    def compute(self) -> str:
        """What a forward depends on beside weights and inputs: its dtype, whose layers, attention and torch."""
        dtype = "bfloat16" if self.mixed else str(next(self.module.parameters()).dtype)
        layers = " liger" if self.fused else ""
        return f"{dtype}{layers}, {self.check_attention()} attention, torch {torch.__version__}"

    @property
    def mixed(self) -> bool:
        # Full fine-tuning in bf16 keeps fp32 weights: at lr 1e-6 a bf16 weight would not move.
        return self.config.dtype == "bfloat16" and not self.has_adapter

    def _autocast(self) -> Any:
        return autocast(self.device, torch.bfloat16) if self.mixed else nullcontext()


def _end_ids(module: Any, tokenizer: Any) -> list[int]:
    ids = module.generation_config.eos_token_id if module.generation_config is not None else None
    ids = ids if ids is not None else tokenizer.eos_token_id
    if ids is None:
        raise InputError("an end-of-sequence token", "none in generation_config or tokenizer", field="model.path")
    ids = [ids] if isinstance(ids, int) else list(ids)
    # the tokenizer's own first: of several ends it is the one that closes a turn
    return sorted(ids, key=lambda i: i != tokenizer.eos_token_id)
