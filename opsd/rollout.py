"""Sampling from the student's own view: G responses per prompt, on the weights that are being trained.

Every prompt is computed once for its G responses. At most `slots` responses run at a time; when some have ended the
next ones take their slots, so that a long response holds up nobody.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from opsd import plain_rollout
from opsd.decode import Room, Slots
from opsd.engine import prefill
from opsd.few_rows import few_rows
from opsd.fit import Budget, retried
from opsd.graphs import Graphs, obstacle
from opsd.model import LanguageModel
from opsd.packing import in_passes
from opsd.prefix_entry import Stored
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.sampling import Sampling
from opsd.say import say_once

# On an accelerator "who has finished?" is asked once in so many tokens: asking waits for the device.
_TOKENS_BETWEEN_CHECKS = 16
_IDLE = 0.25  # share of idle slots worth a pass over waiting prompts; on a CPU, worth going on without them


class Rollouts:
    """A model that answers. On CUDA it keeps its buffers from call to call, and the graphs captured on them.

    slots: responses decoded at a time. graphs: capture decode steps (CUDA only). share_prefix: False is the plain twin.
    budget: of the passes over prompts, in tokens; a prompt is never divided. A rollout that runs out of memory is done
    once more with half the slots in passes of half the tokens, here, later and after a resume: its responses depend on
    neither.
    """

    def __init__(
        self,
        model: LanguageModel,
        slots: int = 64,
        graphs: bool = True,
        share_prefix: bool = True,
        budget: Budget | None = None,
    ):
        self.model, self.share_prefix = model, share_prefix
        self.budget = budget if budget is not None else Budget(sys.maxsize, Path(), writes=False)
        self._slots = slots
        self.graphs = graphs and _capturable(model)
        self._kept: tuple[tuple[Room, Sampling], Slots, Graphs] | None = None

    @torch.no_grad()
    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Responses:
        """G responses for each of B prompts; a response ends with an end token, a stop string or at max_new_tokens.

        seeds: one per prompt. The random number behind token t of response g is a function of (its prompt's seed, g, t)
        alone, so a response does not depend on what else is in the batch, nor on `slots`.
        """
        with self.model.mode(train=False), self.model.gathered(), few_rows(self.model.module):
            if not self.share_prefix:
                return plain_rollout.rollout(self.model, prompts, sampling, seeds)
            before = replace(self.model.tokens)

            def smaller() -> str:
                self.model.tokens = before
                return self._halve(len(prompts) * sampling.group_size, sum(prompt.length for prompt in prompts))

            return retried(lambda: _Loop(self, prompts, sampling, seeds).run(), smaller, self.model.device)

    @property
    def slots(self) -> int:
        """Responses decoded at a time, at most."""
        return min(self._slots, self.budget.slots)

    @property
    def tokens(self) -> int:
        """Of a pass over prompts, at most."""
        return min(self.budget.tokens, self.budget.prompt_tokens)

    def _halve(self, responses: int, tokens: int) -> str:
        """Half of what a rollout of so many responses to prompts of so many tokens had at a time."""
        slots, self._kept = min(self.slots, responses), None
        self.budget.halve_rollouts(slots, min(self.tokens, tokens))
        say_once(f"out of memory: rollouts decode at most {self.slots} responses at a time from here on")
        return f"out of memory in a rollout of {slots} responses at a time, and of {self.slots}"

    def board(self, room: Room, sampling: Sampling, like: Stored) -> tuple[Slots, Graphs]:
        """Device tensors with this much room."""
        if self.model.device.type != "cuda":
            return Slots(self.model, room, sampling, like), Graphs()
        key = room.rounded(), sampling
        if self._kept is None or self._kept[0] != key:
            self._kept = None  # its memory goes first
            self._kept = key, Slots(self.model, key[0], sampling, like), Graphs()
        return self._kept[1:]


def rollout(
    model: LanguageModel, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int], **options: Any
) -> Responses:
    """One call of `Rollouts`, whose options these are."""
    return Rollouts(model, **options)(prompts, sampling, seeds)


def decode(tokenizer: Any, responses: Responses) -> list[str]:
    """Text of every response, special tokens left out."""
    rows = [tokens[:n] for tokens, n in zip(responses.tokens.tolist(), responses.lengths, strict=True)]
    return tokenizer.batch_decode(rows, skip_special_tokens=True)


@dataclass
class _Lane:
    """A prompt that is being answered."""

    place: int
    stored: Stored  # without its keys: the lane has them
    left: int  # responses of it that have not ended


class _Loop:
    """Who runs where. The host decides between steps; the device does the steps."""

    def __init__(self, owner: Rollouts, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]):
        self.owner, self.model, self.prompts = owner, owner.model, prompts
        self.sampling, self.seeds, self.group = sampling, seeds, sampling.group_size
        self.on_cpu = self.model.device.type == "cpu"
        total = len(prompts) * self.group
        count = min(owner.slots, total)
        self.waiting = deque(range(total))  # responses, prompt by prompt
        self.lanes: dict[int, _Lane] = {}  # by prompt
        self.free_lanes = list(range(min(len(prompts), 2 * -(-count // self.group))))
        self.room = Room(count, len(self.free_lanes), max(prompt.length for prompt in prompts), total)
        self.held: list[int | None] = [None] * count  # the response in each slot
        self.shown = [0] * count  # its tokens that the model has seen, at most
        self.slots: Slots | None = None
        self.graphs = Graphs()

    def run(self) -> Responses:
        steps = 0
        while self._let_in():
            slots, running = self.slots, self._running()
            assert slots is not None
            columns = 1 + max(self.shown[slot] for slot in running)
            slots.reserve(columns)
            if self.owner.graphs:
                key = slots.capacity, tuple(slots.grid.shape)
                self.graphs.run(key, lambda: slots.step(slots.capacity))  # noqa: B023 - it is called at once
            else:
                slots.step(columns)
            self.shown = [shown + 1 for shown in self.shown]
            steps += 1
            check = steps % _TOKENS_BETWEEN_CHECKS == 0
            if self.on_cpu or check:
                self._retire(every=check)
        assert self.slots is not None
        responses = self.slots.draw.read(len(self.prompts))
        longest = self.room.longest_prompt + max(responses.lengths) - 1
        fed = sum(responses.lengths) - len(responses.lengths)  # the prompts are counted where they are computed
        self.model.tokens.add(fed, longest * len(responses.lengths))
        return responses

    def _running(self) -> list[int]:
        return [slot for slot, response in enumerate(self.held) if response is not None]

    def _let_in(self) -> bool:
        """Give free slots to waiting responses, once there are enough of them; False when all is done."""
        free = [slot for slot, response in enumerate(self.held) if response is None]
        while self.waiting and len(free) >= _IDLE * len(self.held):
            entering = self._next(free)
            if not entering:
                break
            self._begin(entering)
            self._retire(every=False)  # a first token may be the last
            free = [slot for slot, response in enumerate(self.held) if response is None]
        return bool(self._running())

    def _next(self, free: list[int]) -> list[tuple[int, int]]:
        """Slots and the responses that get them; prompts among them that are new get lanes."""
        entering: list[tuple[int, int]] = []
        fresh: list[int] = []
        for slot in free:
            if not self.waiting:
                break
            prompt = self.waiting[0] // self.group
            if prompt not in self.lanes and prompt not in fresh:
                if len(fresh) == len(self.free_lanes):
                    break
                fresh.append(prompt)
            entering.append((slot, self.waiting.popleft()))
        self._open_lanes(fresh)
        return entering

    def _open_lanes(self, fresh: list[int]) -> None:
        for some in in_passes(fresh, [self.prompts[i].length for i in fresh], self.owner.tokens):
            for prompt, stored in zip(some, prefill(self.model, [self.prompts[i] for i in some]), strict=True):
                if self.slots is None:
                    self.slots, self.graphs = self.owner.board(self.room, self.sampling, stored)
                    self.slots.draw.reset(self.seeds)
                bare = replace(stored, keys=[], values=[])
                lane = self.lanes[prompt] = _Lane(self.free_lanes.pop(0), bare, self.group)
                self.slots.let_in(lane.place, stored)

    def _begin(self, entering: list[tuple[int, int]]) -> None:
        assert self.slots is not None
        slots, responses = map(list, zip(*entering, strict=True))
        self.slots.begin(slots, responses, [self.lanes[i // self.group].stored for i in responses])
        for slot, response in entering:
            self.held[slot], self.shown[slot] = response, 0
        self._arrange()

    def _retire(self, every: bool) -> None:
        """Free the slots of responses that have ended, and lanes without responses; on a CPU, drop idle slots.

        every: look for stop strings in all responses, not in those alone that have ended anyway.
        """
        assert self.slots is not None
        rows, draw = self.slots.row.tolist(), self.slots.draw
        held = [(response, row) for response, row in zip(self.held, rows, strict=True) if response is not None]
        stopped = draw.cut([response for response, row in held if every or row != response])
        for slot, row in enumerate(rows):
            response = self.held[slot]
            if response is None or (row == response and response not in stopped):
                continue
            self.held[slot] = None
            self.slots.row[slot] = len(draw.checked)  # nobody's
            prompt = response // self.group
            self.lanes[prompt].left -= 1
            if not self.lanes[prompt].left:
                self.free_lanes.append(self.lanes.pop(prompt).place)
        running = self._running()
        if self.on_cpu and not self.waiting and 0 < len(running) <= (1 - _IDLE) * len(self.held):
            self.slots.keep(running)
            self.held, self.shown = [self.held[i] for i in running], [self.shown[i] for i in running]
            self._arrange()

    def _arrange(self) -> None:
        assert self.slots is not None
        lanes: list[list[int]] = [[] for _ in range(1 + max(lane.place for lane in self.lanes.values()))]
        for slot, response in enumerate(self.held):
            if response is not None:
                lanes[self.lanes[response // self.group].place].append(slot)
        self.slots.arrange(lanes, fixed=not self.on_cpu)


def _capturable(model: LanguageModel) -> bool:
    if model.device.type != "cuda":
        return False
    if model.shards is not None:
        say_once("no CUDA graphs: weights that are gathered for each rollout lie elsewhere each time")
        return False
    decoder, capability = model.module.get_decoder(), torch.cuda.get_device_capability(model.device)
    reason = obstacle(decoder, "bfloat16" in model.compute, capability)
    say_once("decode steps are captured in CUDA graphs" if reason is None else f"no CUDA graphs: {reason}")
    return reason is None
