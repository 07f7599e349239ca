"""Sampling from the student's own view: G responses per prompt, on the weights that are being trained.

Every prompt is computed once for its G responses. At most `slots` responses run at a time; when one ends the next one
takes its slot, so that a long response holds up nobody.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from opsd import plain
from opsd.decode import Slots
from opsd.engine import Stored, prefill
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.sampling import Sampling, choose, uniforms

# On an accelerator "who has finished?" is asked once in so many tokens: asking waits for the device.
_TOKENS_BETWEEN_CHECKS = 16
_IDLE = 0.25  # share of idle slots at which the others go on without them (CPU)


@torch.no_grad()
def rollout(
    model: LanguageModel,
    prompts: Sequence[Prompt],
    sampling: Sampling,
    seeds: Sequence[int],  # one per prompt
    slots: int = 64,
    share_prefix: bool = True,
) -> Responses:
    """G responses for each of B prompts; a response ends with an end token or at max_new_tokens.

    The random number behind token t of response g is a function of (its prompt's seed, g, t) alone, so a response does
    not depend on what else is in the batch, nor on `slots`.
    """
    with model.mode(train=False):
        if not share_prefix:
            return _plain(model, prompts, sampling, seeds)
        return _Loop(model, prompts, sampling, seeds, slots).run()


def decode(tokenizer: Any, responses: Responses) -> list[str]:
    """Text of every response, special tokens left out."""
    rows = [tokens[:n] for tokens, n in zip(responses.tokens.tolist(), responses.lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


class Draw:
    """From hidden states to tokens, and the record of what was drawn. R responses; row R takes what nobody wants."""

    def __init__(self, model: LanguageModel, sampling: Sampling, responses: int):
        device = model.device
        self.sampling, self.responses = sampling, responses
        self.head = model.head.detach()
        self.end = torch.tensor(model.end_ids, device=device)
        self.suppressed = torch.tensor(model.suppressed_ids, device=device, dtype=torch.long)
        shape = responses + 1, sampling.max_new_tokens
        self.tokens = torch.full(shape, model.pad_id, device=device)
        self.logprobs = torch.zeros(shape, device=device)
        self.lengths = torch.zeros(responses + 1, dtype=torch.long, device=device)

    def next(self, hidden: Tensor, rows: Tensor, at: Tensor, seeds: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (B,) of responses `rows` at places `at`, recorded; and whether each response ends with its token."""
        logits = torch.nn.functional.linear(hidden, self.head.to(hidden.dtype)).float()
        token, logprob = choose(logits, uniforms(seeds, g, at), self.sampling, self.suppressed)
        self.tokens[rows, at] = token
        self.logprobs[rows, at] = logprob
        self.lengths[rows] = at + 1
        return token, torch.isin(token, self.end) | (at + 1 >= self.sampling.max_new_tokens)

    def read(self, owners: Sequence[int]) -> Responses:
        lengths = self.lengths[:-1].tolist()
        width = max(lengths, default=0)
        return Responses(self.tokens[:-1, :width], tuple(lengths), tuple(owners), self.logprobs[:-1, :width])


@dataclass
class _Lane:
    """A prompt that is being answered."""

    stored: Stored
    left: int  # responses of it that have not ended


class _Loop:
    """Who runs where. The host decides between steps; the device does the steps."""

    def __init__(
        self, model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], slots: int
    ):
        self.model, self.prompts, self.group = model, prompts, sampling.group_size
        total = len(prompts) * self.group
        count = min(slots, total)
        self.draw = Draw(model, sampling, total)
        self.waiting = deque(range(total))  # responses, prompt by prompt
        self.lanes: dict[int, _Lane] = {}  # by prompt
        self.lane_of: dict[int, int] = {}  # of each prompt that has one
        self.free_lanes = list(range(min(len(prompts), 2 * -(-count // self.group))))
        self.lane_count = len(self.free_lanes)
        self.held: list[int | None] = [None] * count  # the response in each slot
        self.age = [0] * count  # tokens drawn since it began, at most
        every = torch.arange(total + 1, device=model.device)
        self.g = every % self.group
        self.seeds = torch.tensor([*seeds, 0], device=model.device)[every // self.group]
        self.row = torch.full((count,), total, device=model.device)  # the response in each slot; total: nobody's
        self.slots: Slots | None = None

    def run(self) -> Responses:
        step = 0
        while self._let_in():
            slots = self.slots
            assert slots is not None
            token, ends = self.draw.next(slots.hidden, self.row, slots.fed, self.seeds[self.row], self.g[self.row])
            self.row.masked_fill_(ends, self.draw.responses)
            self.age = [age + 1 for age in self.age]
            step += 1
            if self.model.device.type == "cpu" or step % _TOKENS_BETWEEN_CHECKS == 0:
                self._retire()
            if not self._running():
                continue
            token = self._compact(token)
            slots.feed(token, max(self.age[slot] for slot in self._running()))
            slots.fed.add_(self.row < self.draw.responses)
        return self.draw.read([i // self.group for i in range(self.draw.responses)])

    def _running(self) -> list[int]:
        return [slot for slot, response in enumerate(self.held) if response is not None]

    def _let_in(self) -> bool:
        """Give free slots to waiting responses, when enough are free to be worth a pass; False when all is done."""
        free = [slot for slot, response in enumerate(self.held) if response is None]
        if self.waiting and (len(free) >= _IDLE * len(self.held)):
            entering: list[tuple[int, int]] = []
            fresh: list[int] = []
            for slot in free:
                if not self.waiting:
                    break
                prompt = self.waiting[0] // self.group
                if prompt not in self.lane_of:
                    if not self.free_lanes:
                        break
                    self.lane_of[prompt] = self.free_lanes.pop(0)
                    fresh.append(prompt)
                entering.append((slot, self.waiting.popleft()))
            self._open_lanes(fresh)
            for slot, response in entering:
                self._begin(slot, response)
            if entering:
                self._arrange()
        return bool(self._running())

    def _open_lanes(self, fresh: list[int]) -> None:
        if not fresh:
            return
        for prompt, stored in zip(fresh, prefill(self.model, [self.prompts[i] for i in fresh]), strict=True):
            if self.slots is None:
                longest = max(prompt.length for prompt in self.prompts)
                self.slots = Slots(self.model, len(self.held), self.lane_count, longest, stored)
            self.slots.let_in(self.lane_of[prompt], stored)
            # the lane has the keys now; what starts a response is all that is still wanted
            self.lanes[prompt] = _Lane(replace(stored, keys=[], values=[]), self.group)

    def _begin(self, slot: int, response: int) -> None:
        assert self.slots is not None
        prompt = response // self.group
        self.slots.begin(slot, self.lane_of[prompt], self.lanes[prompt].stored)
        self.held[slot], self.age[slot] = response, 0
        self.row[slot] = response

    def _retire(self) -> None:
        """Free the slots of responses that have ended, and lanes without responses."""
        for slot, row in enumerate(self.row.tolist()):
            response = self.held[slot]
            if response is None or row == response:
                continue
            self.held[slot] = None
            lane = self.lanes[response // self.group]
            lane.left -= 1
            if not lane.left:
                self.free_lanes.append(self.lane_of.pop(response // self.group))
                del self.lanes[response // self.group]

    def _compact(self, token: Tensor) -> Tensor:
        """On a CPU, where time is computed rows, go on without idle slots once nobody waits for them."""
        running = self._running()
        if self.waiting or self.model.device.type != "cpu" or len(running) > (1 - _IDLE) * len(self.held):
            return token
        assert self.slots is not None
        self.slots.keep(running)
        self.held, self.age = [self.held[i] for i in running], [self.age[i] for i in running]
        self.row = self.row[running]
        self._arrange()
        return token[running]

    def _arrange(self) -> None:
        assert self.slots is not None
        lanes: list[list[int]] = [[] for _ in range(max(self.lane_of.values()) + 1)]
        for slot in self._running():
            response = self.held[slot]
            assert response is not None
            lanes[self.lane_of[response // self.group]].append(slot)
        self.slots.arrange(lanes)


def _plain(model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Responses:
    """The plain twin: every response with a prompt of its own, transformers' cache, all rows to the end."""
    group = sampling.group_size
    rows = torch.arange(len(prompts) * group, device=model.device)
    seeds_of, g = torch.tensor(seeds, device=model.device)[rows // group], rows % group
    draw = Draw(model, sampling, len(rows))
    prefix = plain.prefill(model, [prompt for prompt in prompts for _ in range(group)])
    hidden, row = prefix.last_hidden, rows
    seen = torch.ones(len(rows), 0, dtype=torch.bool, device=model.device)
    for step in range(sampling.max_new_tokens):
        token, ends = draw.next(hidden, row, torch.full_like(rows, step), seeds_of, g)
        seen = torch.cat([seen, (row < len(rows))[:, None]], 1)
        row = row.masked_fill(ends, len(rows))
        if not bool((row < len(rows)).any()):
            break
        hidden = plain.extend(model, prefix, token[:, None], seen, offset=step)[:, 0]
    return draw.read([i // group for i in range(len(rows))])
