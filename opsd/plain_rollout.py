"""The plain twin of a rollout: every response with a prompt of its own, transformers' cache, all rows to the end.

`engine.share_prefix=false`. Slow and simple: what opsd/rollout.py is tested against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd import plain
from opsd.draw import Draw
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.sampling import Sampling


def rollout(model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Responses:
    """G responses for each of B prompts, as of `opsd.rollout.Rollouts`."""
    owners = [prompt for prompt in prompts for _ in range(sampling.group_size)]
    count = len(owners)
    draw = Draw(model, sampling, count)
    draw.reset(seeds)
    every = torch.arange(count, device=model.device)
    # a window would count the padding of a shorter prompt
    for rows in every.split(1 if plain.has_windows(model) else count):
        _rows(model, [owners[i] for i in rows.tolist()], rows, draw)
    draw.cut(range(count))
    return draw.read(len(prompts))


def _rows(model: LanguageModel, owners: list[Prompt], row: Tensor, draw: Draw) -> None:
    count, prefix = len(draw.checked), plain.prefill(model, owners)
    hidden = prefix.last_hidden
    seen = torch.ones(len(owners), 0, dtype=torch.bool, device=model.device)
    for step in range(draw.sampling.max_new_tokens):
        token, ends = draw.next(hidden, row, torch.full_like(row, step))
        seen = torch.cat([seen, (row < count)[:, None]], 1)
        row = row.masked_fill(ends, count)
        if not bool((row < count).any()):
            break
        hidden = plain.extend(model, prefix, token[:, None], seen, offset=step)[:, 0]
