"""Which queries meet which keys: a packed row cut into parts that one attention kernel call each can do.

Parts are made once per row and shared by the layers. For kernels that want rectangles, spans of like length are
stacked and padded with repeats of their last token; for ragged (varlen) kernels all spans of a kind are one part.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from opsd.packing import Packed, Span, tokens_of
from opsd.transfer import to_device

# Rectangles whose shortest span is at least this share of the longest are worth one call instead of two.
_FILL = 0.75
_SHORT = 48  # below so many tokens a call costs more than the padding


class Joined:
    """Tensors (tokens, heads, ...) one after another. They are copied together only for who reads across several."""

    def __init__(self, pieces: Sequence[Tensor]):
        self.pieces = pieces

    def narrow(self, dim: int, start: int, length: int) -> Tensor:
        at = start
        for piece in self.pieces:
            if 0 <= at <= len(piece) - length:
                return piece.narrow(dim, at, length)
            at -= len(piece)
        return self._whole.narrow(dim, start, length)

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        return self._whole.index_select(dim, index)

    def zeros(self) -> Tensor:
        first = self.pieces[0]
        return first.new_zeros(sum(map(len, self.pieces)), *first.shape[1:])

    @cached_property
    def _whole(self) -> Tensor:
        return torch.cat(list(self.pieces)) if len(self.pieces) > 1 else self.pieces[0]


class Rows(Protocol):
    """Tokens of a tensor (tokens, heads, ...) that one part reads and writes."""

    def take(self, x: Tensor | Joined) -> Tensor: ...

    def take_grad(self, x: Tensor) -> Tensor:
        """take, with zeros where a token is a repeat."""

    def put(self, target: Tensor, values: Tensor) -> Tensor:
        """The target with the values in it; where they are all of it, no more than the values."""

    def add(self, target: Tensor, values: Tensor) -> None: ...


class Rectangle:
    """n spans of a common length L: (tokens, heads, ...) -> (n, heads, L, ...)."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        self.lengths = [length for _, length in spans]
        self.n, self.width = len(spans), max(self.lengths)
        first = spans[0][0]
        equal = min(self.lengths) == self.width
        self.view = equal and all(start == first + i * self.width for i, (start, _) in enumerate(spans))
        self.first = first
        if self.view:
            return
        steps = torch.arange(self.width)
        starts, lengths = torch.tensor([s for s, _ in spans]), torch.tensor(self.lengths)
        index = starts[:, None] + torch.minimum(steps, lengths[:, None] - 1)
        real = steps < lengths[:, None]
        self.index = to_device(index.flatten(), device)
        self.padded = not bool(real.all())
        self.real = to_device(real, device)  # (n, L)
        self.source = to_device(real.flatten().nonzero()[:, 0], device)
        self.destination = to_device(index[real], device)

    def take(self, x: Tensor | Joined) -> Tensor:
        shape = (self.n, self.width)
        tokens = x.narrow(0, self.first, self.n * self.width) if self.view else x.index_select(0, self.index)
        return tokens.unflatten(0, shape).transpose(1, 2)

    def take_grad(self, x: Tensor) -> Tensor:
        taken = self.take(x)
        return taken if self.view or not self.padded else taken * self.real[:, None, :, None].to(x.dtype)

    def put(self, target: Tensor, values: Tensor) -> Tensor:
        if not self.view:
            return target.index_copy_(0, self.destination, self._real(values))
        if self.n * self.width == len(target):
            return values.transpose(1, 2).flatten(0, 1)
        self.take(target).copy_(values)
        return target

    def add(self, target: Tensor, values: Tensor) -> None:
        if self.view:
            self.take(target).add_(values)
        else:
            target.index_add_(0, self.destination, self._real(values))

    def _real(self, values: Tensor) -> Tensor:
        tokens = values.transpose(1, 2).flatten(0, 1)
        return tokens.index_select(0, self.source) if self.padded else tokens


class Ragged:
    """Spans one after another: (tokens, heads, ...) -> (tokens of the spans, heads, ...), with their offsets."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        self.lengths = [length for _, length in spans]
        self.width = max(self.lengths)
        total = sum(self.lengths)
        self.first, self.total = spans[0][0], total
        ends = [start + length for start, length in spans]
        self.view = all(end == start for end, (start, _) in zip(ends[:-1], spans[1:], strict=True))
        self.index = None if self.view else to_device(tokens_of(spans), device)
        self.offsets = _offsets(self.lengths, device)

    def take(self, x: Tensor | Joined) -> Tensor:
        return x.narrow(0, self.first, self.total) if self.index is None else x.index_select(0, self.index)

    take_grad = take  # nothing is repeated

    def put(self, target: Tensor, values: Tensor) -> Tensor:
        if self.index is not None:
            return target.index_copy_(0, self.index, values)
        if self.total == len(target):
            return values
        self.take(target).copy_(values)
        return target

    def add(self, target: Tensor, values: Tensor) -> None:
        if self.index is None:
            self.take(target).add_(values)
        else:
            target.index_add_(0, self.index, values)


@dataclass(frozen=True)
class Part:
    """One kernel call. Row i of the queries meets row i of the keys."""

    queries: Rows
    keys: Rows
    causal: bool  # ends of queries and keys are aligned
    merged: bool  # into a part that already wrote these queries
    mask: Tensor | None = None  # (n, 1, 1 or L, L_keys) bool, rectangles only: which keys count
    window: int | None = None  # ragged only: keys at distance < window


Plan = list[Part]


def plan(packed: Packed, window: int | None, ragged: bool, device: torch.device) -> Plan:
    """Parts of a row. window: keys further back than this many tokens are not seen (None: all are)."""
    make = _ragged_parts if ragged else _rectangle_parts
    own, crossing = _pairs(packed, window)
    return make(own, window, device) + make(crossing, None, device, merged=True)


Pair = tuple[Span, list[Span]]  # a run of queries, and the spans of its keys one after another


def _pairs(packed: Packed, window: int | None) -> tuple[list[Pair], list[Pair]]:
    """Causal pairs, which come first and together hold every query; pairs of children with their whole root."""
    own: list[Pair] = []
    crossing: list[Pair] = []
    for tree, root, children in zip(packed.trees, packed.roots, packed.children, strict=True):
        fed = [child for child in children if child[1]]
        if not tree.stored and len(fed) == 1 and len(children) == 1:  # nothing is shared: one causal run
            whole = (root[0], root[1] + fed[0][1])
            own.append((whole, [whole]))
            continue
        if not tree.stored:
            own.append((root, [root]))
        if window is not None:  # a window is counted over root and child together: the tail it can reach comes along
            tail = min(root[1], window - 1)
            own += [(child, [(root[0] + root[1] - tail, tail), child] if tail else [child]) for child in fed]
            continue
        own += [(child, [child]) for child in fed]
        if fed:
            first, last = fed[0], fed[-1]
            crossing.append(((first[0], last[0] + last[1] - first[0]), [root]))
    return own, crossing


def _ragged_parts(pairs: list[Pair], window: int | None, device: torch.device, merged: bool = False) -> Plan:
    if not pairs:
        return []
    queries = Ragged([query for query, _ in pairs], device)
    return [Part(queries, _ragged_keys(pairs, device), causal=not merged, merged=merged, window=window)]


def _ragged_keys(pairs: list[Pair], device: torch.device) -> Ragged:
    keys = Ragged([span for _, spans in pairs for span in spans], device)
    keys.lengths = [sum(length for _, length in spans) for _, spans in pairs]
    keys.width = max(keys.lengths)
    keys.offsets = _offsets(keys.lengths, device)
    return keys


def _rectangle_parts(pairs: list[Pair], window: int | None, device: torch.device, merged: bool = False) -> Plan:
    parts = []
    for bucket in _buckets(pairs):
        queries = Rectangle([query for query, _ in bucket], device)
        if window is None and all(len(spans) == 1 for _, spans in bucket):
            keys = Rectangle([spans[0] for _, spans in bucket], device)
            hidden = merged and min(keys.lengths) < keys.width  # repeats of a root's last key must not be seen
            mask = keys.real[:, None, None, :] if hidden else None
            parts.append(Part(queries, keys, causal=not merged, merged=merged, mask=mask))
        else:
            parts += [_windowed(query, spans, window, device) for query, spans in bucket]
    return parts


def _windowed(query: Span, spans: list[Span], window: int | None, device: torch.device) -> Part:
    """One causal run whose keys reach back over its root's tail, with an explicit mask."""
    total = sum(length for _, length in spans)
    keys = _Joined(spans, device)
    place = torch.arange(query[1])[:, None] + total - query[1]
    distance = place - torch.arange(total)
    mask = (distance >= 0) & (distance < (window if window is not None else total))
    return Part(Rectangle([query], device), keys, causal=False, merged=False, mask=to_device(mask[None, None], device))


class _Joined(Rectangle):
    """Several spans as one row of keys."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        super().__init__([(0, sum(length for _, length in spans))], device)
        self.view, self.padded = False, False
        self.index = self.destination = to_device(tokens_of(spans), device)
        self.source = torch.arange(self.width, device=device)


def _offsets(lengths: Sequence[int], device: torch.device) -> Tensor:
    """(n + 1,) where spans of these lengths begin and end, int32 as flash kernels want them."""
    return to_device(torch.tensor([0, *lengths]).cumsum(0).int(), device)


def _buckets(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of like query and key lengths together; order within a bucket is the row's, so runs stay views."""
    width: Callable[[Pair], tuple[int, int]] = lambda pair: (pair[0][1], sum(n for _, n in pair[1]))  # noqa: E731
    buckets: list[list[Pair]] = []
    for pair in sorted(pairs, key=width, reverse=True):
        longest = width(buckets[-1][0]) if buckets else (0, 0)
        if buckets and all(_like(a, b) for a, b in zip(width(pair), longest, strict=True)):
            buckets[-1].append(pair)
        else:
            buckets.append([pair])
    return [sorted(bucket) for bucket in buckets]


def _like(length: int, longest: int) -> bool:
    return longest <= _SHORT or length >= _FILL * longest
