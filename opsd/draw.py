"""From hidden states to recorded tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd.model import LanguageModel
from opsd.responses import Responses
from opsd.sampling import Sampling, choose, uniforms


class Draw:
    """Draws tokens and records them with their log-probabilities. R responses; row R takes what nobody wants."""

    def __init__(self, model: LanguageModel, sampling: Sampling, responses: int):
        device = model.device
        self.model, self.sampling = model, sampling
        self.end = torch.tensor(model.end_ids, device=device)
        self.suppressed = torch.tensor(model.suppressed_ids, device=device, dtype=torch.long)
        shape = responses + 1, sampling.max_new_tokens
        self.tokens = torch.full(shape, model.pad_id, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(responses + 1, dtype=torch.long, device=device)
        self.seeds = torch.zeros_like(self.lengths)
        self.places = torch.zeros_like(self.lengths)  # g, of a response among those of its prompt

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin again with one seed per prompt; responses lie prompt by prompt."""
        group, device = self.sampling.group_size, self.tokens.device
        count = len(seeds) * group
        self.seeds[:count] = torch.tensor(seeds).repeat_interleave(group).to(device)
        self.places[:count] = (torch.arange(count) % group).to(device)
        self.tokens.fill_(self.model.pad_id)
        self.logprobs.zero_()
        self.lengths.zero_()

    def next(self, hidden: Tensor, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) of responses `rows` at places `at`, recorded; and whether each response ends with its token."""
        head = self.model.head.detach()
        logits = torch.nn.functional.linear(hidden, head.to(hidden.dtype)).float()
        uniform = uniforms(self.seeds[rows], self.places[rows], at)
        token, logprob = choose(logits, uniform, self.sampling, self.suppressed)
        self.tokens[rows, at] = token
        self.logprobs[rows, at] = logprob
        self.lengths[rows] = at + 1
        return token, torch.isin(token, self.end) | (at + 1 >= self.sampling.max_new_tokens)

    def read(self, prompts: int) -> Responses:
        """What was drawn for so many prompts."""
        group = self.sampling.group_size
        count = prompts * group
        lengths = self.lengths[:count].tolist()
        width = max(lengths, default=0)
        owners = tuple(i // group for i in range(count))
        tokens, logprobs = (x[:count, :width].clone() for x in (self.tokens, self.logprobs))
        return Responses(tokens, tuple(lengths), owners, logprobs)
