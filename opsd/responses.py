"""Sampled or given answers of a batch of prompts."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from opsd.packing import tokens_of
from opsd.transfer import indices, to_device


@dataclass(frozen=True)
class Responses:
    """R responses, prompt by prompt, right-padded. Letters: R responses, T tokens of one, N tokens of all."""

    tokens: Tensor  # (R, max T) int64 on the model's device
    lengths: tuple[int, ...]  # T of each, end token included; on the host, so packing needs no sync
    owners: tuple[int, ...]  # the prompt of each
    logprobs: Tensor | None = None  # (R, max T) fp32, log pi of the tokens when they were drawn

    @staticmethod
    def pack(token_lists: list[list[int]], per_prompt: int, pad_id: int, device: torch.device) -> Responses:
        """Right-pad lists of token ids, per_prompt of them for every prompt."""
        width = max(len(tokens) for tokens in token_lists)
        rows = [tokens + [pad_id] * (width - len(tokens)) for tokens in token_lists]
        owners = tuple(i // per_prompt for i in range(len(rows)))
        return Responses(to_device(torch.tensor(rows, dtype=torch.long), device), tuple(map(len, token_lists)), owners)

    def take(self, chosen: list[int], owners: list[int]) -> Responses:
        """Some of the responses, with the numbers their prompts now have."""
        lengths = tuple(self.lengths[i] for i in chosen)
        index = indices(chosen, self.tokens.device)
        width = max(lengths, default=0)
        tokens, logprobs = (
            None if x is None else x.index_select(0, index)[:, :width] for x in (self.tokens, self.logprobs)
        )
        assert tokens is not None
        return Responses(tokens, lengths, tuple(owners), logprobs)

    @cached_property
    def packed_index(self) -> Tensor:
        """(N,) positions of the real tokens in the flattened (R * max T) grid, response by response."""
        width = self.tokens.shape[1]
        rows = [(i * width, length) for i, length in enumerate(self.lengths)]
        return to_device(tokens_of(rows), self.tokens.device)

    @cached_property
    def packed_tokens(self) -> Tensor:
        """(N,) the real tokens, response by response."""
        return self.tokens.flatten().index_select(0, self.packed_index)

    @property
    def packed_logprobs(self) -> Tensor:
        """(N,) fp32: what the real tokens had when they were drawn; of sampled responses only."""
        assert self.logprobs is not None
        return self.logprobs.flatten().index_select(0, self.packed_index)

    @cached_property
    def token_weights(self) -> Tensor:
        """(N,) fp32: 1/T_i, so that the weighted sum is the sum over responses of their means."""
        lengths = torch.tensor(self.lengths)
        return to_device((1.0 / lengths.float()).repeat_interleave(lengths), self.tokens.device)
