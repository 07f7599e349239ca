"""A few prefixes, many responses: the one way every pass runs the model.

Rollout, teacher scoring and student update all see B prompts with G responses each. The prompt is computed once
and its keys and values are shared by its responses (gradients through them are the sum over the responses). The
plain twin, `engine.share_prefix=false`, runs every response with a prompt of its own; results are equal.

Letters: B prompts, G responses per prompt, P prompt tokens, T response tokens, N valid response tokens, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from opsd.model import LanguageModel
from opsd.prompts import Prompt

# Processor outputs that have one entry per prompt token; everything else is media, concatenated along dim 0.
_PER_TOKEN = ("input_ids", "attention_mask", "mm_token_type_ids", "token_type_ids")


@dataclass(frozen=True)
class Responses:
    """G responses for each of B prompts, prompt-major, right-padded."""

    tokens: Tensor  # (B*G, T) int64 on the model's device
    lengths: list[int]  # B*G lengths >= 1, end token included; on the host, so packing needs no sync
    per_prompt: int  # G

    @cached_property
    def mask(self) -> Tensor:
        """(B*G, T) bool, true on real tokens."""
        steps = torch.arange(self.tokens.shape[1])
        return (steps < torch.tensor(self.lengths)[:, None]).to(self.tokens.device)

    @cached_property
    def packed_index(self) -> Tensor:
        """(N,) positions of the real tokens in the flattened (B*G*T) grid, response by response."""
        width = self.tokens.shape[1]
        rows = [torch.arange(length) + i * width for i, length in enumerate(self.lengths)]
        return torch.cat(rows).to(self.tokens.device)

    @cached_property
    def packed_tokens(self) -> Tensor:
        """(N,) the real tokens, response by response."""
        return self.tokens.flatten().index_select(0, self.packed_index)

    @cached_property
    def token_weights(self) -> Tensor:
        """(N,) fp32: 1/T_i, so that the weighted sum is the sum over responses of their means."""
        lengths = torch.tensor(self.lengths)
        return (1.0 / lengths.float()).repeat_interleave(lengths).to(self.tokens.device)

    @staticmethod
    def pack(token_lists: list[list[int]], per_prompt: int, pad_id: int, device: torch.device) -> Responses:
        """Right-pad lists of token ids (each of at least one token)."""
        width = max(len(tokens) for tokens in token_lists)
        rows = [tokens + [pad_id] * (width - len(tokens)) for tokens in token_lists]
        return Responses(torch.tensor(rows, device=device), [len(t) for t in token_lists], per_prompt)


@dataclass(frozen=True)
class Prefix:
    """Computed prompts, ready for responses to hang off them."""

    cache: Any  # transformers Cache of B (later B*G) rows; a pass that extends it uses it up
    mask: Tensor  # (B, P) 1 on real prompt tokens
    next_position: Tensor  # (B,) position of the first response token
    last_hidden: Tensor  # (B, D) predicts the first response token


def collate(prompts: list[Prompt], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Right-pad token tensors, pad audio features to one length, concatenate the rest: one batch of model inputs."""
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.inputs):
        parts = [prompt.inputs[name] for prompt in prompts if name in prompt.inputs]
        fill = pad_id if name == "input_ids" else 0
        if name in _PER_TOKEN or name in ("input_features", "feature_attention_mask"):
            width = max(part.shape[-1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]
        batch[name] = torch.cat(parts).to(device, non_blocking=True)
    return batch


def prefill(model: LanguageModel, prompts: list[Prompt]) -> Prefix:
    """Run B prompts once and keep their keys and values."""
    batch = collate(prompts, model.pad_id, model.device)
    out = model.forward(**batch, use_cache=True)
    last = torch.tensor([prompt.length - 1 for prompt in prompts], device=model.device)
    rows = torch.arange(len(prompts), device=model.device)
    if out.positions is None:
        next_position = last + 1
    else:  # 3-axis RoPE continues from the largest position on any axis, not from the token count
        valid = batch["attention_mask"].bool()
        next_position = out.positions.amax(0).masked_fill(~valid, 0).amax(-1) + 1
    return Prefix(out.cache, batch["attention_mask"], next_position, out.hidden[rows, last])


def repeat(prefix: Prefix, times: int) -> Prefix:
    """B prompts -> B*times rows sharing the computed prompts; gradients of the copies add up."""
    if times > 1:
        prefix.cache.batch_repeat_interleave(times)
    return Prefix(
        prefix.cache,
        prefix.mask.repeat_interleave(times, 0),
        prefix.next_position.repeat_interleave(times, 0),
        prefix.last_hidden.repeat_interleave(times, 0),
    )


def extend(model: LanguageModel, prefix: Prefix, tokens: Tensor, seen: Tensor, offset: int) -> Tensor:
    """Feed tokens (B, T) that follow `offset` earlier response tokens; returns their hidden states (B, T, D).

    seen: (B, offset + T) mask over the response so far. The prefix's cache grows by T.
    """
    steps = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
    positions = prefix.next_position[:, None] + steps
    out = model.forward(
        input_ids=tokens,
        attention_mask=torch.cat([prefix.mask, seen.to(prefix.mask.dtype)], dim=1),
        position_ids=positions[None].expand(3, -1, -1) if _is_3axis(model) else positions,
        past_key_values=prefix.cache,
        use_cache=True,
    )
    return out.hidden


def response_hidden(
    model: LanguageModel, prompts: list[Prompt], responses: Responses, share_prefix: bool = True
) -> Tensor:
    """Hidden states that predict each response token, packed response by response: (N, D)."""
    if not share_prefix:
        return _response_hidden_plain(model, prompts, responses)
    prefix = repeat(prefill(model, prompts), responses.per_prompt)
    hidden = prefix.last_hidden[:, None]
    if responses.tokens.shape[1] > 1:
        fed = extend(model, prefix, responses.tokens[:, :-1], responses.mask[:, :-1], offset=0)
        hidden = torch.cat([hidden, fed], dim=1)
    return hidden.flatten(0, 1).index_select(0, responses.packed_index)


def _response_hidden_plain(model: LanguageModel, prompts: list[Prompt], responses: Responses) -> Tensor:
    """The plain twin: B*G whole sequences, prompt and media repeated for every response."""
    owners = [prompt for prompt in prompts for _ in range(responses.per_prompt)]
    rows = []
    for prompt, tokens, length in zip(owners, responses.tokens.cpu(), responses.lengths, strict=True):
        rows.append(_with_response(prompt, tokens[:length]))
    batch = collate(rows, model.pad_id, model.device)
    hidden = model.forward(**batch, use_cache=False).hidden
    width = hidden.shape[1]
    index = [
        torch.arange(length) + i * width + owner.length - 1
        for i, (owner, length) in enumerate(zip(owners, responses.lengths, strict=True))
    ]
    return hidden.flatten(0, 1).index_select(0, torch.cat(index).to(model.device))


def _with_response(prompt: Prompt, tokens: Tensor) -> Prompt:
    inputs = dict(prompt.inputs)
    for name in _PER_TOKEN:
        if name in inputs:
            fill = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}.get(name, torch.zeros_like(tokens))
            inputs[name] = torch.cat([inputs[name], fill[None].to(inputs[name].dtype)], dim=1)
    return replace(prompt, inputs=inputs)


def _is_3axis(model: LanguageModel) -> bool:
    parameters = getattr(model.module.config.get_text_config(), "rope_parameters", None) or {}
    return "mrope_section" in parameters
