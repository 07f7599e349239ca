"""Decoding, one token for every slot at a time, on the weights that are being trained.

A slot is a place for one running response, a lane a place for one prompt that its slots share:

    lanes    per layer (lanes, longest prompt, Hkv, d)   written once, when a prompt is let in
    columns  per layer (slots, capacity, Hkv, d)         one column per decoded token

A slot's token attends to its lane and to its own columns, merged by their log-sum-exps. A step asks the device for
nothing, and for given slots, lanes and columns its shapes never change, so that it can be captured in a CUDA graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.attention import merge
from opsd.decode_attention import attend_rows
from opsd.engine import Stored
from opsd.model import LanguageModel

_FIRST_COLUMNS = 64


class Slots:
    """The state of all slots on the device, and one step of the model on it."""

    def __init__(self, model: LanguageModel, slots: int, lanes: int, longest_prompt: int, like: Stored):
        self.model, device = model, model.device
        self.lane_of = torch.zeros(slots, dtype=torch.long, device=device)
        self.start = torch.zeros(slots, dtype=torch.long, device=device)  # position of a response's first token
        self.fed = torch.zeros(slots, dtype=torch.long, device=device)  # tokens of it the model has seen
        self.hidden = like.last_hidden.new_zeros(slots, len(like.last_hidden))  # predicts the next token
        self.lane_lengths = torch.ones(lanes, dtype=torch.long, device=device)
        self.lanes = [_pair(keys, lanes, longest_prompt) for keys in like.keys]
        self.columns = [_pair(keys, slots, _FIRST_COLUMNS) for keys in like.keys]
        self.grid = self.cell = torch.zeros(0, dtype=torch.long, device=device)

    def let_in(self, lane: int, stored: Stored) -> None:
        """Copy a computed prompt into a lane."""
        length = stored.keys[0].shape[1]
        for (keys, values), k, v in zip(self.lanes, stored.keys, stored.values, strict=True):
            keys[lane, :length] = k.transpose(0, 1)
            values[lane, :length] = v.transpose(0, 1)
        self.lane_lengths[lane] = length

    def begin(self, slot: int, lane: int, stored: Stored) -> None:
        """Start a response in a slot."""
        self.lane_of[slot], self.start[slot], self.fed[slot] = lane, stored.next_position, 0
        self.hidden[slot] = stored.last_hidden

    def arrange(self, slots_of_lanes: list[list[int]]) -> None:
        """Say which slots share which lane; lanes without slots are in the list, those behind the last are not."""
        width = max(map(len, slots_of_lanes))
        grid = [slots + [slots[0] if slots else 0] * (width - len(slots)) for slots in slots_of_lanes]
        cell = [0] * len(self.fed)
        for lane, slots in enumerate(slots_of_lanes):
            for place, slot in enumerate(slots):
                cell[slot] = lane * width + place
        self.grid = torch.tensor(grid).to(self.fed.device)  # (lanes, width) slots
        self.cell = torch.tensor(cell).to(self.fed.device)  # (slots,) place in the flattened grid

    def feed(self, tokens: Tensor, columns: int) -> None:
        """Run the model on a token (slots,) of each; no slot has more than `columns` tokens then."""
        while self.columns[0][0].shape[1] < columns:
            self.columns = [(_doubled(keys), _doubled(values)) for keys, values in self.columns]
        positions = (self.start + self.fed).expand(self.model.axes, -1)
        self.hidden.copy_(self.model.forward_packed(tokens[None], positions, {}, StepKV(self, columns)))

    def keep(self, chosen: list[int]) -> None:
        """Go on with these slots only; `arrange` must follow."""
        index = torch.tensor(chosen).to(self.fed.device)
        self.lane_of, self.start, self.fed, self.hidden = (
            x.index_select(0, index) for x in (self.lane_of, self.start, self.fed, self.hidden)
        )
        self.columns = [(k.index_select(0, index), v.index_select(0, index)) for k, v in self.columns]


class StepKV:
    """What one decode step carries to the attention layers, in the place of opsd.attention.PackedKV."""

    def __init__(self, slots: Slots, columns: int):
        self.slots, self.columns = slots, columns
        self.masks: dict[int | None, tuple[Tensor | None, Tensor | None]] = {None: (None, None)}

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
        """q (H, slots, d), k and v (Hkv, slots, d) -> (H, slots, d)."""
        slots = self.slots
        if window not in self.masks:
            self.masks[window] = self._windowed(window)
        own_mask, lane_mask = self.masks[window]
        q = q.transpose(0, 1)
        for column, new in zip(slots.columns[layer], (k, v), strict=True):
            place = slots.fed[:, None, None, None].expand(-1, 1, *column.shape[2:])
            column.scatter_(1, place, new.transpose(0, 1)[:, None])
        out, lse = attend_rows(q[:, None], *slots.columns[layer], slots.fed + 1, own_mask, scale, self.columns)

        lanes, width = slots.grid.shape
        keys, values = (x[:lanes] for x in slots.lanes[layer])
        asked = q.index_select(0, slots.grid.flatten()).unflatten(0, (lanes, width))
        lengths, longest = slots.lane_lengths[:lanes], keys.shape[1]
        shared, shared_lse = attend_rows(asked, keys, values, lengths, lane_mask, scale, longest)
        shared, shared_lse = (x.flatten(0, 1).index_select(0, slots.cell) for x in (shared, shared_lse))
        return merge(out[:, 0], lse[:, 0], shared, shared_lse)[0].transpose(0, 1)

    def _windowed(self, window: int | None) -> tuple[Tensor, Tensor]:
        """Masks (slots, 1, columns) and (lanes, width, longest prompt) of keys at distance < window."""
        assert window is not None
        slots = self.slots
        at, place = slots.fed[:, None, None], torch.arange(self.columns, device=slots.fed.device)
        lengths = slots.lane_lengths[: len(slots.grid), None, None]
        prompt = torch.arange(slots.lanes[0][0].shape[1], device=slots.fed.device)
        distance = lengths + slots.fed[slots.grid][..., None] - prompt
        return (place <= at) & (at - place < window), (prompt < lengths) & (distance < window)


def _pair(like: Tensor, rows: int, length: int) -> tuple[Tensor, Tensor]:
    heads, _, width = like.shape
    return like.new_zeros(rows, length, heads, width), like.new_zeros(rows, length, heads, width)


def _doubled(columns: Tensor) -> Tensor:
    return torch.cat([columns, torch.zeros_like(columns)], 1)
