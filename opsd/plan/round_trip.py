"""A layer's forward and backward, seen apart from the pass it is in, and then told of the layers that are alike."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd.plan.ledger import Ledger
from opsd.plan.names import GRADIENTS
from opsd.plan.shapes import Place

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # of a layer, by place and by name; the first is what it changes


class RoundTrip(NamedTuple):
    """What a layer does to the ledger, bytes by name. Those of a rise come on top of what is alive when it begins."""

    given: Place
    result: Place
    there: Counter[str]  # the rise of the forward
    keeps: Counter[str]  # for the backward
    keeps_inputs: tuple[bool, ...]  # too, of those on meta
    back: Counter[str]  # the rise of the backward
    grown: tuple[bool, ...]  # parameters that have a gradient afterwards and had none before


def seen_apart(
    ledger: Ledger, layer: Callable[..., Any], inputs: Inputs, parameters: Sequence[Tensor]
) -> RoundTrip | None:
    """The round trip of a layer within a phase, from inputs in places like these; the ledger is as before.

    None for a layer that is not told in this way: its result is no tensor or is kept by itself, or something else than
    gradients stays.
    """
    before, bare = ledger.known(), [p.grad is None for p in parameters]
    with ledger.apart():
        found = _seen(ledger, layer, inputs, parameters)
        for p, was_bare in zip(parameters, bare, strict=True):
            p.grad = None if was_bare else p.grad
    return found if ledger.since(before) == [] else None


def _seen(ledger: Ledger, layer: Callable[..., Any], inputs: Inputs, parameters: Sequence[Tensor]) -> RoundTrip | None:
    bare, rises, its = [p.grad is None for p in parameters], list[Any](), list[int]()
    place = Place.of(inputs[0][0])

    def stand_in(x: Tensor) -> Tensor:
        start = torch.empty(0, device="meta", requires_grad=True)
        made: Tensor = Place.of(x).another() if its else _Begin.apply(start, place, rises)
        its.append(id(made.untyped_storage()))
        return made

    args, kwargs = _changed(inputs, stand_in)
    before, risen = ledger.known(), ledger.from_here()
    out = layer(*args, **kwargs)
    there = risen()
    del args, kwargs
    if not isinstance(out, Tensor):
        return None
    result, whole = Place.of(out), id(out.untyped_storage())
    end = _End.apply(out, result, ledger, rises)
    del out
    known = ledger.known()
    if whole in known:
        return None
    keeps = ledger.sizes(key for key in known if key not in before)
    keeps_inputs = tuple(key in known for key in its)
    end.backward(torch.empty(0, device="meta"))
    grown = tuple(was_bare and p.grad is not None for p, was_bare in zip(parameters, bare, strict=True))
    return RoundTrip(place, result, there, keeps, keeps_inputs, rises[-1], grown)


def told(ledger: Ledger, trip: RoundTrip, inputs: Inputs, parameters: Sequence[Tensor]) -> Tensor:
    """The result of a layer whose round trip is known."""
    held = [x for x, kept in zip(on_meta(inputs), trip.keeps_inputs, strict=True) if kept]
    out: Tensor = _Told.apply(inputs[0][0], trip, ledger, parameters, held)
    return out


def on_meta(x: Any) -> Iterator[Tensor]:
    """The tensors on meta in nested arguments, in the order of `_changed`."""
    if isinstance(x, Tensor):
        if x.is_meta:
            yield x
    elif isinstance(x, (list, tuple, dict)):
        for one in x.values() if isinstance(x, dict) else x:
            yield from on_meta(one)


def _changed(x: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested arguments with other tensors in the place of those on meta."""
    if isinstance(x, Tensor):
        return change(x) if x.is_meta else x
    if isinstance(x, (list, tuple)):
        return type(x)([_changed(one, change) for one in x])
    if isinstance(x, dict):
        return {name: _changed(one, change) for name, one in x.items()}
    return x


class _Begin(torch.autograd.Function):
    """An input of which nobody but the layer keeps hold; its gradient ends the backward."""

    @staticmethod
    def forward(ctx: Any, start: Tensor, place: Place, rises: list[Any]) -> Tensor:
        ctx.rises = rises
        return place.another()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[None, ...]:
        ctx.rises.append(ctx.rises.pop()())
        return None, None, None


class _End(torch.autograd.Function):
    """What comes after the layer: a gradient that nobody but the layer keeps hold of."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, place: Place, ledger: Ledger, rises: list[Any]) -> Tensor:
        ctx.place, ctx.ledger, ctx.rises = place, ledger, rises
        return out.new_empty(0)

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        grad: Tensor = ctx.place.another()
        ctx.rises.append(ctx.ledger.from_here())
        return grad, None, None, None


class _Told(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, given: Tensor, trip: RoundTrip, ledger: Ledger, parameters: Sequence[Tensor], held: list[Tensor]
    ) -> Tensor:
        ctx.trip, ctx.ledger, ctx.parameters = trip, ledger, parameters
        ledger.rise(trip.there)
        ctx.kept = held + ledger.made(trip.keeps)
        return trip.result.another()

    @staticmethod
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        trip, ledger = ctx.trip, ctx.ledger
        ledger.rise(trip.back)
        ctx.kept = None
        for p, grows in zip(ctx.parameters, trip.grown, strict=True):
            if grows:
                p.grad = torch.empty_like(p)
                ledger.name([p.grad], GRADIENTS)
        grad = upstream if Place.of(upstream) == trip.given else trip.given.another()
        return grad, None, None, None, None
