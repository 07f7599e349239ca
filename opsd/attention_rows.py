"""Tokens of a packed row as a kernel reads and writes them: rectangles of spans, or spans one after another."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor

from opsd.packing import Span, tokens_of
from opsd.transfer import to_device


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

    def __init__(self, spans: Sequence[Span], device: torch.device, lengths: Sequence[int] | None = None):
        """lengths: of the rows, where one is more than a span."""
        self.lengths = list(lengths) if lengths is not None else [length for _, length in spans]
        self.width = max(self.lengths)
        total = sum(self.lengths)
        self.first, self.total = spans[0][0], total
        ends = [start + length for start, length in spans]
        self.view = all(end == start for end, (start, _) in zip(ends[:-1], spans[1:], strict=True))
        self.index = None if self.view else to_device(tokens_of(spans), device)
        self.offsets = to_device(torch.tensor([0, *self.lengths]).cumsum(0).int(), device)  # (n + 1,), as kernels want

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


class OneRow(Rectangle):
    """Several spans as one row of keys."""

    def __init__(self, spans: Sequence[Span], device: torch.device):
        super().__init__([(0, sum(length for _, length in spans))], device)
        self.view, self.padded = False, False
        self.index = self.destination = to_device(tokens_of(spans), device)
        self.source = torch.arange(self.width, device=device)
