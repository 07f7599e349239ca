"""Decoding, one token for every slot at a time, on the weights that are being trained.

A slot is a place for one running response, a lane a place for one prompt that its slots share:

    lanes    per layer (lanes, longest prompt, Hkv, d)   written once, when a prompt is let in
    columns  per layer (slots, capacity, Hkv, d)         one column per decoded token

A slot's token attends to its lane and to its own columns, merged by their log-sum-exps. A step asks the device for
nothing, writes into tensors that stay where they are, and has shapes that only change when slots, lanes or the
capacity do, so that it can be captured in a CUDA graph (opsd/graphs.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from opsd.attention import merge
from opsd.decode_attention import Seen, attend_rows
from opsd.draw import Draw
from opsd.model import LanguageModel
from opsd.prefix_entry import Stored
from opsd.sampling import Sampling
from opsd.transfer import indices, to_device

_FIRST_COLUMNS = 64


@dataclass(frozen=True)
class Room:
    """How much a decode loop has room for."""

    slots: int
    lanes: int
    longest_prompt: int
    responses: int

    def rounded(self) -> Room:
        """Up, so that the steps of a run share their buffers and graphs."""
        return Room(self.slots, self.lanes, -(-self.longest_prompt // 256) * 256, -(-self.responses // 64) * 64)


class Slots:
    """The state of all slots on the device, and one step of the model on it."""

    def __init__(self, model: LanguageModel, room: Room, sampling: Sampling, like: Stored):
        self.model, self.room, device = model, room, model.device
        self.draw = Draw(model, sampling, room.responses)
        self.row = torch.full((room.slots,), room.responses, device=device)  # its response; `responses`: nobody's
        self.token = torch.zeros_like(self.row)  # drawn, not yet seen by the model
        self.fed = torch.zeros_like(self.row)  # tokens the model has seen
        self.start = torch.zeros(room.slots, device=device)  # position of the response's first token, maybe a fraction
        self.lane_lengths = torch.ones(room.lanes, dtype=torch.long, device=device)
        self.lanes = [_pair(keys, room.lanes, room.longest_prompt) for keys in like.keys]
        self.columns = [_pair(keys, room.slots, _FIRST_COLUMNS) for keys in like.keys]
        self.grid = torch.zeros(room.lanes, 1, dtype=torch.long, device=device)  # (lanes, width) the slots of a lane
        self.cell = torch.zeros_like(self.row)  # place of a slot in the flattened grid
        self.in_order = False  # the flattened grid is the slots, one after another

    @property
    def capacity(self) -> int:
        return self.columns[0][0].shape[1]

    def let_in(self, lane: int, stored: Stored) -> None:
        """Copy a computed prompt into a lane."""
        length = stored.keys[0].shape[1]
        for (keys, values), k, v in zip(self.lanes, stored.keys, stored.values, strict=True):
            keys[lane, :length] = k.transpose(0, 1)
            values[lane, :length] = v.transpose(0, 1)
        self.lane_lengths[lane] = length

    def begin(self, slots: Sequence[int], responses: Sequence[int], prompts: Sequence[Stored]) -> None:
        """Start responses in slots: their first tokens are drawn from what their prompts predict."""
        device = self.row.device
        at, rows = indices(slots, device), indices(responses, device)
        token, ends = self.draw.next(torch.stack([one.last_hidden for one in prompts]), rows, torch.zeros_like(rows))
        self.token[at] = token
        self.row[at] = rows.masked_fill(ends, self.room.responses)
        self.start[at] = to_device(torch.tensor([float(one.next_position) for one in prompts]), device)
        self.fed[at] = 0

    def arrange(self, slots_of_lanes: list[list[int]], fixed: bool) -> None:
        """Say which slots share which lane. fixed: keep the grid's shape whatever is running, for a captured step."""
        width = max(map(len, slots_of_lanes))
        if fixed:
            width = max(width, self.grid.shape[1])
            slots_of_lanes = slots_of_lanes + [[]] * (self.room.lanes - len(slots_of_lanes))
        grid = [slots + [slots[0] if slots else 0] * (width - len(slots)) for slots in slots_of_lanes]
        cell = [0] * len(self.row)
        for lane, slots in enumerate(slots_of_lanes):
            for place, slot in enumerate(slots):
                cell[slot] = lane * width + place
        self.grid = _into(self.grid, torch.tensor(grid))
        self.in_order = not fixed and [slot for slots in grid for slot in slots] == list(range(len(self.row)))
        self.cell = _into(self.cell, torch.tensor(cell))

    def reserve(self, columns: int) -> None:
        """Room for so many tokens per slot."""
        while self.capacity < columns:
            self.columns = [(_doubled(keys), _doubled(values)) for keys, values in self.columns]

    def step(self, columns: int) -> None:
        """Show the model every slot's token and draw the next one; no slot has been shown more than `columns` then."""
        positions = (self.start + self.fed).expand(self.model.axes, -1)
        hidden = self.model.forward_packed(self.token[None], positions, {}, StepKV(self, columns))
        self.fed.add_(self.row < self.room.responses)
        token, ends = self.draw.next(hidden, self.row, self.fed)
        self.token.copy_(token)
        self.row.masked_fill_(ends, self.room.responses)

    def keep(self, chosen: list[int]) -> None:
        """Go on with these slots only; `arrange` must follow."""
        index = indices(chosen, self.row.device)
        self.row, self.token, self.fed, self.start = (x[index] for x in (self.row, self.token, self.fed, self.start))
        self.cell = self.cell[index]
        self.columns = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.columns]


class StepKV:
    """What one decode step carries to the attention layers, in the place of opsd.attention.PackedKV."""

    def __init__(self, slots: Slots, columns: int):
        self.slots, self.columns = slots, columns
        self.place = slots.fed[:, None, None, None]  # the column that each slot's token takes
        lanes, longest = len(slots.grid), slots.lanes[0][0].shape[1]
        own, lane = Seen(slots.fed + 1, columns), Seen(slots.lane_lengths[:lanes], longest)
        self.seen: dict[int | None, tuple[Seen, Seen]] = {None: (own, lane)}  # by window

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q (H, slots, d), k and v (Hkv, slots, d) -> (slots, H, d)."""
        slots = self.slots
        if window not in self.seen:
            self.seen[window] = self._windowed(window)
        own, lane = self.seen[window]
        choice = slots.model.attention
        q = q.transpose(0, 1)
        for column, new in zip(slots.columns[layer], (k, v), strict=True):
            column.scatter_(1, self.place.expand(-1, 1, *column.shape[2:]), new.transpose(0, 1)[:, None])
        out, lse = attend_rows(q[:, None], *slots.columns[layer], own, scale, choice)

        lanes, width = slots.grid.shape
        keys, values = (x[:lanes] for x in slots.lanes[layer])
        asked = q if slots.in_order else q.index_select(0, slots.grid.flatten())
        shared = attend_rows(asked.unflatten(0, (lanes, width)), keys, values, lane, scale, choice)
        theirs, theirs_lse = (x.flatten(0, 1) for x in shared)
        if not slots.in_order:
            theirs, theirs_lse = (x.index_select(0, slots.cell) for x in (theirs, theirs_lse))
        return merge(out[:, 0], lse[:, 0], theirs, theirs_lse)[0]

    def _windowed(self, window: int | None) -> tuple[Seen, Seen]:
        """Keys at distance < window: (slots, 1, columns) and (lanes, width, longest prompt)."""
        assert window is not None
        slots, (own, lane) = self.slots, self.seen[None]
        at, place = slots.fed[:, None, None], torch.arange(self.columns, device=slots.fed.device)
        lengths = slots.lane_lengths[: len(slots.grid), None, None]
        prompt = torch.arange(slots.lanes[0][0].shape[1], device=slots.fed.device)
        distance = lengths + slots.fed[slots.grid][..., None] - prompt
        return (
            replace(own, mask=(place <= at) & (at - place < window)),
            replace(lane, mask=(prompt < lengths) & (distance < window)),
        )


def _pair(like: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    heads, _, width = like.shape
    return like.new_zeros(rows, length, heads, width), like.new_zeros(rows, length, heads, width)


def _doubled(columns: Tensor) -> Tensor:
    return torch.cat([columns, torch.zeros_like(columns)], 1)


def _into(target: Tensor, values: Tensor) -> Tensor:
    """The values, where the target lies if they have its shape."""
    moved = to_device(values, target.device)
    return target.copy_(moved) if target.shape == values.shape else moved
