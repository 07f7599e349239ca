"""Bytes of meta tensors that are alive, by what they are for, and the most there ever were at a time."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.plan.names import ACTIVATIONS, ON_HOST
from opsd.plan.shapes import Shapes

T = TypeVar("T")
Known = dict[int, tuple[weakref.ref[Any], str, int]]  # of a storage's id: itself, its name, its bytes


class Ledger(TorchDispatchMode):
    """Inside, every storage that an operator makes on meta is entered under the current name, until it is freed.

    The operators are those of the real pass, forward and backward, so what autograd keeps, what checkpointing gives up
    and which temporaries meet are not modelled but seen. What a kernel allocates within itself is not.
    block: an allocator's unit in bytes, to which sizes are rounded up.
    """

    def __init__(self, block: int = 1) -> None:
        super().__init__()
        self.block = block
        self.live: Counter[str] = Counter()
        self.at_peak: Counter[str] = Counter()
        self._name = ACTIVATIONS
        self._total = self._peak = 0
        self._most: Counter[str] = Counter()  # on the host, whose peak is another
        self._known: Known = {}
        self._shapes = Shapes()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = self._shapes(func, args, kwargs or {})
        if isinstance(out, Tensor):
            self._enter(out)
        elif isinstance(out, list | tuple):
            for one in out:
                if isinstance(one, Tensor):
                    self._enter(one)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Not to be wrapped once more for a compiler that does not run here."""
        return False

    def name(self, tensors: Iterable[Tensor | None], name: str) -> None:
        """Enter tensors, those made before the ledger was opened too, under a name of their own."""
        for tensor in tensors:
            if tensor is not None:
                self._forget(id(tensor.untyped_storage()))
                self._enter(tensor, name)

    @contextmanager
    def under(self, name: str) -> Iterator[None]:
        """Inside, what is made is entered under a name."""
        before, self._name = self._name, name
        try:
            yield
        finally:
            self._name = before

    @contextmanager
    def phase(self) -> Iterator[Counter[str]]:
        """What is alive by name when there is most of it inside; complete when the context ends."""
        seen: Counter[str] = Counter()
        self._peak, self.at_peak = self._total, self.live.copy()
        self._most = Counter({name: self.live[name] for name in ON_HOST})
        with self:
            yield seen
        seen.update(+(self.at_peak | self._most))

    def watched(self, call: Callable[[], T]) -> tuple[T, Counter[str], list[int] | None]:
        """call() within a phase; what was alive on top of the bytes before when there was most of it; and the storages
        that it leaves behind, sorted ids, or None where it freed one that was there before."""
        outer, known = (self._peak, self.at_peak), self.known()
        risen = self.from_here()
        out = call()
        rise = risen()
        if outer[0] >= self._peak:
            self._peak, self.at_peak = outer
        return out, rise, self.since(known)

    def from_here(self) -> Callable[[], Counter[str]]:
        """Begin a peak anew. The result tells what was alive at that peak on top of what is alive now; less than
        nothing of what had gone by then."""
        before = self.live.copy()
        self._peak, self.at_peak = self._total, before

        def risen() -> Counter[str]:
            rise = self.at_peak.copy()
            rise.subtract(before)
            return rise

        return risen

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Afterwards the peak is what it was before."""
        outer = self._peak, self.at_peak
        try:
            yield
        finally:
            self._peak, self.at_peak = outer

    def known(self) -> Known:
        """The storages that are alive, by id."""
        return self._known.copy()

    def since(self, known: Known) -> list[int] | None:
        """Sorted ids of the storages that have come, or None where one has gone."""
        gone = any(storage() is None for storage, _, _ in known.values())
        return None if gone else sorted(self._known.keys() - known.keys())

    def made(self, sizes: Counter[str]) -> list[Tensor]:
        """Tensors of so many bytes by name."""
        found = []
        for name, size in sizes.items():
            with self.under(name):
                found.append(torch.empty(size, dtype=torch.uint8, device="meta"))
        return found

    def sizes(self, keys: Iterable[int]) -> Counter[str]:
        """Bytes of storages by name."""
        found = Counter[str]()
        for key in keys:
            _, name, size = self._known[key]
            found[name] += size
        return found

    def rise(self, by: Counter[str]) -> None:
        """As if so much had been alive for a moment."""
        total = self._total + by.total()
        if total > self._peak:
            self._peak, self.at_peak = total, self.live + by

    def _enter(self, tensor: Tensor, name: str | None = None) -> None:
        if not tensor.is_meta:
            return
        storage = tensor.untyped_storage()
        key, name = id(storage), name or self._name
        if key in self._known or not storage.nbytes():
            return
        size = -(-storage.nbytes() // self.block) * self.block
        self._known[key] = weakref.ref(storage, lambda _: self._forget(key)), name, size
        self._change(name, size)

    def _forget(self, key: int) -> None:
        found = self._known.pop(key, None)
        if found is not None:
            self._change(found[1], -found[2])

    def _change(self, name: str, size: int) -> None:
        self.live[name] += size
        if name in ON_HOST:
            self._most[name] = max(self._most[name], self.live[name])
            return
        self._total += size
        if self._total > self._peak:
            self._peak, self.at_peak = self._total, self.live.copy()
