"""From hidden states to recorded tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd.few_rows import product
from opsd.logits import finish, logits_of
from opsd.model import LanguageModel
from opsd.responses import Responses
from opsd.sampling import Sampling, choose, uniforms
from opsd.stopping import StopStrings
from opsd.transfer import indices, to_device
from opsd_kernels import Head


class Draw:
    """Draws tokens and records them with their log-probabilities. R responses; row R takes what nobody wants."""

    def __init__(self, model: LanguageModel, sampling: Sampling, responses: int):
        device = model.device
        self.model, self.sampling = model, sampling
        self.stops = StopStrings(model.tokenizer, sampling.stop)
        self.checked = [0] * responses  # tokens of each in which no stop string was found
        self.end = to_device(torch.tensor(model.end_ids), device)
        self.suppressed = indices(model.suppressed_ids, device)
        self._wide: Head | None = None
        shape = responses + 1, sampling.max_new_tokens
        self.tokens = torch.full(shape, model.pad_id, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(responses + 1, dtype=torch.long, device=device)
        self.uniform = torch.zeros(shape, dtype=torch.float64, device=device)  # behind every token

    def reset(self, seeds: Sequence[int]) -> None:
        """Begin again with one seed per prompt; responses lie prompt by prompt."""
        group, device = self.sampling.group_size, self.tokens.device
        count = len(seeds) * group
        seed = to_device(torch.tensor(seeds).repeat_interleave(group), device)
        step = torch.arange(self.sampling.max_new_tokens, device=device)
        self.uniform[:count] = uniforms(seed[:, None], to_device(torch.arange(count) % group, device)[:, None], step)
        self.tokens.fill_(self.model.pad_id)
        self.logprobs.zero_()
        self.lengths.zero_()
        self.checked = [0] * len(self.checked)

    def next(self, hidden: Tensor, rows: Tensor, at: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) of responses `rows` at places `at`, recorded; and whether each response ends with its token."""
        logits = self._logits(hidden)
        token, logprob = choose(logits, self.uniform[rows, at], self.sampling, self.suppressed)
        self.tokens[rows, at] = token
        self.logprobs[rows, at] = logprob
        self.lengths[rows] = at + 1
        ends = (token[:, None] == self.end).any(-1)  # torch.isin may sort, and then waits for the device
        return token, ends | (at + 1 >= self.sampling.max_new_tokens)

    def _logits(self, hidden: Tensor) -> Tensor:
        head = self.model.head
        if head.weight.device.type != "cpu":
            return logits_of(hidden, head)
        if self._wide is None:  # once: a Draw on a CPU serves one call, in which the weights stand still
            self._wide = head.view().to(hidden.dtype).to(torch.float32)
        return finish(product(hidden.float(), self._wide.weight), self._wide)

    def cut(self, responses: Sequence[int]) -> set[int]:
        """Those of these responses whose text contains a stop string by now, cut after the token that completed it."""
        if not self.stops.strings or not responses:
            return set()
        index, found = indices(responses, self.tokens.device), set()
        lengths = self.lengths[index].tolist()
        tokens = self.tokens[index, : max(lengths)].tolist()
        for response, row, length in zip(responses, tokens, lengths, strict=True):
            end = self.stops.first(row[:length], self.checked[response])
            self.checked[response] = length
            if end is not None:
                self.tokens[response, end:], self.logprobs[response, end:] = self.model.pad_id, 0.0
                self.lengths[response] = end
                found.add(response)
        return found

    def read(self, prompts: int) -> Responses:
        """What was drawn for so many prompts."""
        group = self.sampling.group_size
        count = prompts * group
        lengths = self.lengths[:count].tolist()
        width = max(lengths, default=0)
        owners = tuple(i // group for i in range(count))
        tokens, logprobs = (x[:count, :width].clone() for x in (self.tokens, self.logprobs))
        return Responses(tokens, tuple(lengths), owners, logprobs)
