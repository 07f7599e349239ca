"""Sampling from the student's own view: G responses per prompt, on the weights that are being trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from opsd.config import RolloutConfig
from opsd.plain import extend, prefill
from opsd.responses import Responses
from opsd.model import LanguageModel
from opsd.prompts import Prompt

# On an accelerator "has everybody finished?" is asked once in so many tokens: asking waits for the device.
_TOKENS_BETWEEN_CHECKS = 16


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. temperature 0 is greedy."""

    group_size: int  # G
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int | None = None

    @staticmethod
    def of(config: RolloutConfig) -> Sampling:
        return Sampling(config.group_size, config.max_new_tokens, config.temperature, config.top_p, config.top_k)

    @staticmethod
    def greedy(max_new_tokens: int) -> Sampling:
        return Sampling(1, max_new_tokens, temperature=0.0)


@torch.no_grad()
def rollout(model: LanguageModel, prompts: list[Prompt], sampling: Sampling, seeds: list[int]) -> Responses:
    """G responses for each of B prompts; a response ends with an end token or at max_new_tokens.

    seeds: one integer per prompt. Response g of a prompt consumes a stream of uniforms that depends only on its
    prompt's seed and g, so a response does not depend on what else is in the batch.
    """
    rows = len(prompts) * sampling.group_size
    end = torch.tensor(model.end_ids, device=model.device)
    suppressed = torch.tensor(model.suppressed_ids, device=model.device, dtype=torch.long)
    uniforms = _uniforms(seeds, sampling).to(model.device)
    head = model.head.detach()

    with model.mode(train=False):
        prefix = prefill(model, [p for p in prompts for _ in range(sampling.group_size)])
        tokens = torch.full((rows, sampling.max_new_tokens), model.pad_id, device=model.device)
        mask = torch.zeros_like(tokens, dtype=torch.bool)
        running = torch.ones(rows, dtype=torch.bool, device=model.device)
        hidden = prefix.last_hidden
        for step in range(sampling.max_new_tokens):
            logits = torch.nn.functional.linear(hidden, head.to(hidden.dtype)).float()
            logits.index_fill_(1, suppressed, -torch.inf)
            token = choose(logits, uniforms[:, step], sampling)
            tokens[:, step] = torch.where(running, token, model.pad_id)
            mask[:, step] = running
            running = running & ~torch.isin(token, end)
            if _all_done(running, step) or step + 1 == sampling.max_new_tokens:
                break
            hidden = extend(model, prefix, tokens[:, step : step + 1], mask[:, : step + 1], offset=step)[:, 0]
    lengths = mask.sum(1).tolist()
    return Responses(tokens[:, : max(lengths)], tuple(lengths), tuple(i // sampling.group_size for i in range(rows)))


def choose(
    logits: Tensor,  # (B, V) fp32
    uniform: Tensor,  # (B,) fp64 in [0, 1)
    sampling: Sampling,
) -> Tensor:  # (B,) int64
    """Greedy, or inverse-CDF sampling after temperature, top-k and top-p (in that order, as in transformers)."""
    if sampling.temperature == 0.0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k is not None:
        kth = logits.topk(min(sampling.top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    if sampling.top_p < 1.0:
        ordered, index = logits.sort(-1, descending=True)
        probability = ordered.softmax(-1)
        beyond = probability.cumsum(-1) - probability >= sampling.top_p  # the first token always stays
        logits = logits.scatter(-1, index, ordered.masked_fill(beyond, -torch.inf))
    # fp64: an fp32 running sum over 150k entries would shift the tail by more than its own probability.
    cdf = logits.double().softmax(-1).cumsum(-1)
    return torch.searchsorted(cdf, (uniform * cdf[:, -1])[:, None], right=True)[:, 0].clamp_(max=logits.shape[-1] - 1)


def decode(tokenizer: Any, responses: Responses) -> list[str]:
    """Text of every response, special tokens left out."""
    rows = [tokens[:n] for tokens, n in zip(responses.tokens.tolist(), responses.lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


def _uniforms(seeds: list[int], sampling: Sampling) -> Tensor:
    """(B*G, max_new_tokens) fp64, row b*G + g a function of (seeds[b], g) alone."""
    streams = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed)
        shape = (sampling.group_size, sampling.max_new_tokens)
        streams.append(torch.rand(shape, generator=generator, dtype=torch.float64))
    return torch.cat(streams)


def _all_done(running: Tensor, step: int) -> bool:
    if running.device.type != "cpu" and (step + 1) % _TOKENS_BETWEEN_CHECKS:
        return False
    return not bool(running.any())
