"""The plain twin of the packed engine: whole padded sequences, one per response, transformers' attention and cache.

`engine.share_prefix=false`. Slow and simple: what opsd/engine.py and opsd/rollout.py are tested against.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd.model import LanguageModel
from opsd.positions import axes
from opsd.prompts import PER_TOKEN, Prompt
from opsd.responses import Responses


@dataclass(frozen=True)
class Prefix:
    """Computed prompts, each ready for one response."""

    cache: Any  # transformers Cache of B rows; a pass that extends it uses it up
    mask: Tensor  # (B, P) 1 on real prompt tokens
    next_position: Tensor  # (B,) position of the first response token
    last_hidden: Tensor  # (B, D) predicts the first response token


def has_windows(model: LanguageModel) -> bool:
    """Whether some layer of the decoder sees a window of tokens only."""
    return "sliding_attention" in (getattr(model.module.config.get_text_config(), "layer_types", None) or ())


def collate(prompts: Sequence[Prompt], pad_id: int, device: torch.device) -> dict[str, Tensor]:
    """Right-pad token tensors, pad audio features to one length, concatenate the rest: one batch of model inputs."""
    batch: dict[str, Tensor] = {}
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.inputs):
        parts = [prompt.inputs[name] for prompt in prompts if name in prompt.inputs]
        fill = pad_id if name == "input_ids" else 0
        if name in PER_TOKEN or name in ("input_features", "feature_attention_mask"):
            width = max(part.shape[-1] for part in parts)
            parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1]), value=fill) for part in parts]
        batch[name] = torch.cat(parts).to(device, non_blocking=True)
    return batch


def prefill(model: LanguageModel, prompts: Sequence[Prompt]) -> Prefix:
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


def extend(model: LanguageModel, prefix: Prefix, tokens: Tensor, seen: Tensor, offset: int) -> Tensor:
    """Feed tokens (B, T) that follow `offset` earlier response tokens; returns their hidden states (B, T, D).

    seen: (B, offset + T) mask over the response so far. The prefix's cache grows by T.
    """
    steps = torch.arange(offset, offset + tokens.shape[1], device=tokens.device)
    positions = prefix.next_position[:, None] + steps
    out = model.forward(
        input_ids=tokens,
        attention_mask=torch.cat([prefix.mask, seen.to(prefix.mask.dtype)], dim=1),
        position_ids=positions[None].expand(3, -1, -1) if axes(model.module) == 3 else positions,
        past_key_values=prefix.cache,
        use_cache=True,
    )
    return out.hidden


def response_hidden(model: LanguageModel, prompts: Sequence[Prompt], responses: Responses) -> Tensor:
    """Hidden states that predict each response token, packed response by response: (N, D)."""
    owners = [prompts[owner] for owner in responses.owners]
    rows = []
    for prompt, tokens, length in zip(owners, responses.tokens.cpu(), responses.lengths, strict=True):
        rows.append(_with_response(prompt, tokens[:length]))
    batch = collate(rows, model.pad_id, model.device)
    hidden = model.forward(**batch, use_cache=False).hidden
    width = hidden.shape[1]
    model.tokens.add(hidden.shape[0] * width, hidden.shape[0] * width)
    index = [
        torch.arange(length) + i * width + owner.length - 1
        for i, (owner, length) in enumerate(zip(owners, responses.lengths, strict=True))
    ]
    return hidden.flatten(0, 1).index_select(0, torch.cat(index).to(model.device))


def _with_response(prompt: Prompt, tokens: Tensor) -> Prompt:
    inputs = dict(prompt.inputs)
    for name in PER_TOKEN:
        if name in inputs:
            fill = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}.get(name, torch.zeros_like(tokens))
            inputs[name] = torch.cat([inputs[name], fill[None].to(inputs[name].dtype)], dim=1)
    return replace(prompt, inputs=inputs)
