"""Layers that are alike, rehearsed once a pass where no gradient is wanted: the second is seen, the others are told.

The first layer of a pass may leave behind what all of them use. A later one that leaves nothing but its results, and
frees nothing that was there, does to the ledger what any layer of its kind will do in this pass.
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
from opsd.plan.shapes import described

_OWN = ("layer_idx", "training", "forward", "kwargs")  # of a layer alone or of the whole pass; what peft made it with
_SIMPLE = (bool, int, float, str, type(None), list, tuple, dict, set, partial, torch.dtype, torch.device)


class _Place(NamedTuple):
    """A tensor in a storage of its own, which may be longer."""

    items: int
    offset: int
    size: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype

    @staticmethod
    def of(x: Tensor) -> _Place:
        items = x.untyped_storage().nbytes() // x.itemsize
        return _Place(int(items), int(x.storage_offset()), x.size(), x.stride(), x.dtype)

    def another(self) -> Tensor:
        whole = torch.empty(self.items, dtype=self.dtype, device="meta")
        return whole.as_strided(self.size, self.stride, self.offset)


class _Seen(NamedTuple):
    """What a layer leaves, and the bytes by name on top of what was alive before when it has most."""

    results: list[_Place]  # its output; its keys and values, where the pass keeps them
    rise: Counter[str]


class Alike:
    """Put around the layers of a decoder on meta. Where gradients are wanted they run as ever."""

    def __init__(self, ledger: Ledger, layers: Iterable[nn.Module]):
        self.ledger = ledger
        self._pass: weakref.ref[Any] | None = None
        self._seen: dict[Any, _Seen] = {}  # of this pass, by the kind of layer and what it is given
        for index, layer in enumerate(layers):
            own = type(layer).forward.__get__(layer)
            layer.forward = partial(self._forward, own, index, _kind(layer))

    def _forward(self, own: Callable[..., Any], index: int, kind: Any, *args: Any, **kwargs: Any) -> Any:
        carried = kwargs.get("packed")
        if carried is None or torch.is_grad_enabled():
            return own(*args, **kwargs)
        if self._pass is None or self._pass() is not carried:
            self._pass, self._seen = weakref.ref(carried), {}
        kept = getattr(carried, "kept", {})
        key = kind, described(args), described({name: x for name, x in kwargs.items() if x is not carried})
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
            self._seen[key] = _Seen([_Place.of(x) for x in results], rise)
        return out


def _kind(layer: nn.Module) -> Any:
    """Equal for layers with the same modules, settings and shapes of parameters."""
    return tuple(
        (name, type(one), _settings(one), tuple((n, p.shape, p.dtype) for n, p in _own_tensors(one)))
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
