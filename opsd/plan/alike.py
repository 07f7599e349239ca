"""Layers that are alike, rehearsed once a pass: one is seen, the others are told.

The first layer of a pass may leave behind what all of them use. Where no gradient is wanted, a later one that leaves
nothing but its results, and frees nothing that was there, does to the ledger what any layer of its kind will do in this
pass. Where gradients are wanted the second one makes its round trip apart from the pass.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from opsd.plan.ledger import Ledger
from opsd.plan.round_trip import RoundTrip, on_meta, seen_apart, told
from opsd.plan.shapes import Place, described

_OWN = ("layer_idx", "training", "forward", "kwargs")  # of a layer alone or of the whole pass; what peft made it with
_SIMPLE = (bool, int, float, str, type(None), list, tuple, dict, set, partial, torch.dtype, torch.device)


class _Seen(NamedTuple):
    """What a layer leaves, and the bytes by name on top of what was alive before when it has most."""

    results: list[Place]  # its output; its keys and values, where the pass keeps them
    rise: Counter[str]


class Alike:
    """Put around the layers of a decoder on meta. trips: tell round trips too, not forwards without gradients alone.

    Round trips are of backwards that free what they use, and of layers that leave the rest of the pass alone: not with
    retain_graph, not where inputs of several layers are on their way to the host.
    """

    def __init__(self, ledger: Ledger, layers: Iterable[Any], trips: bool):
        self.ledger, self.trips = ledger, trips
        self._pass: weakref.ref[Any] | None = None
        self._seen: dict[Any, _Seen] = {}  # of this pass, by the kind of layer and what it is given
        self._trips: dict[Any, RoundTrip | None] = {}  # the same; None: to be rehearsed, each of them
        self._met: set[Any] = set()
        for index, layer in enumerate(layers):
            kind = _kind(layer)
            own = type(layer).forward.__get__(layer)
            layer.forward = partial(self._forward, layer, own, index, kind)
            if hasattr(layer, "_gradient_checkpointing_func"):
                checkpoint = layer._gradient_checkpointing_func
                layer._gradient_checkpointing_func = partial(self._checkpointed, layer, checkpoint, kind)

    def _forward(self, layer: Any, own: Callable[..., Any], index: int, kind: Any, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return self._there(own, index, kind, args, kwargs)
        if layer.training and getattr(layer, "gradient_checkpointing", False):  # within the checkpoint
            return own(*args, **kwargs)
        return self._there_and_back(layer, own, kind, args, kwargs)

    def _checkpointed(
        self, layer: nn.Module, checkpoint: Callable[..., Any], kind: Any, function: partial[Any], *args: Any
    ) -> Any:
        """transformers' call of a checkpointed layer: what it gets by name is in `function` already."""

        def own(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(partial(function.func, **kwargs), *args)

        return self._there_and_back(layer, own, kind, args, function.keywords)

    def _there(
        self, own: Callable[..., Any], index: int, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A forward without gradients."""
        key = self._key(kind, args, kwargs)
        if key is None:
            return own(*args, **kwargs)
        kept = getattr(kwargs["packed"], "kept", {})
        if key in self._seen:
            seen = self._seen[key]
            self.ledger.rise(seen.rise)
            out, *pair = [place.another() for place in seen.results]
            if pair:
                kept[index] = tuple(pair)
            return out
        out, rise, left = self.ledger.watched(lambda: own(*args, **kwargs))
        results = [out, *kept.get(index, ())]
        if all(isinstance(x, Tensor) for x in results) and left == sorted(id(x.untyped_storage()) for x in results):
            self._seen[key] = _Seen([Place.of(x) for x in results], rise)
        return out

    def _there_and_back(
        self, layer: nn.Module, own: Callable[..., Any], kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """A forward that a backward will follow."""
        differentiable = [x.requires_grad for x in on_meta((args, kwargs))]
        told_of = self.trips and args and differentiable[0] and not any(differentiable[1:])  # of the first input alone
        key = self._key(kind, args, kwargs) if told_of else None
        if key is None:
            return own(*args, **kwargs)
        if key not in self._met:
            self._met.add(key)
            return own(*args, **kwargs)
        inputs, parameters = (args, kwargs), list(layer.parameters())
        if key not in self._trips:
            self._trips[key] = seen_apart(self.ledger, own, inputs, parameters)
        trip = self._trips[key]
        return own(*args, **kwargs) if trip is None else told(self.ledger, trip, inputs, parameters)

    def _key(self, kind: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Equal for layers of a pass that do the same to the ledger; None outside a packed pass."""
        carried = kwargs.get("packed")
        if carried is None:
            return None
        if self._pass is None or self._pass() is not carried:
            self._pass, self._seen, self._trips, self._met = weakref.ref(carried), {}, {}, set()
        return kind, described(args), described({name: x for name, x in kwargs.items() if x is not carried})


def _kind(layer: nn.Module) -> Any:
    """Equal for layers with the same modules, settings and shapes of parameters."""
    return tuple(
        (name, type(one), _settings(one), tuple((n, p.shape, p.dtype, p.requires_grad) for n, p in _own_tensors(one)))
        for name, one in layer.named_modules()
    )


def _settings(module: nn.Module) -> tuple[tuple[str, str], ...]:
    """Attributes by name: plain ones by value, others by identity."""
    return tuple(
        (name, repr(x) if isinstance(x, _SIMPLE) else f"{type(x).__name__} {id(x)}")
        for name, x in vars(module).items()
        if name not in _OWN and not name.startswith("_")
    )


def _own_tensors(module: nn.Module) -> Iterable[tuple[str, Tensor]]:
    yield from module.named_parameters(recurse=False)
    yield from module.named_buffers(recurse=False)
