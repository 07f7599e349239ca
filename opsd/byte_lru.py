"""Values under a budget in bytes, the least recently used first out."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class ByteLru(Generic[K, V]):
    """An ordered dict with a budget; room is made before a value comes in, so `bytes <= budget` always holds."""

    def __init__(self, budget: int, size: Callable[[V], int]):
        self.budget, self.size = budget, size
        self.bytes = 0
        self.evictions = 0
        self._kept: OrderedDict[K, V] = OrderedDict()  # least recently used first

    def __len__(self) -> int:
        return len(self._kept)

    def fits(self, value: V) -> bool:
        """Whether the value alone is within the budget."""
        return self.size(value) <= self.budget

    def get(self, key: K) -> V | None:
        value = self._kept.get(key)
        if value is not None:
            self._kept.move_to_end(key)
        return value

    def put(self, key: K, value: V) -> list[tuple[K, V]]:
        """Keep the value; returns what had to go, oldest first. A value that does not fit goes itself."""
        self.pop(key)
        size, gone = self.size(value), []
        if size > self.budget:
            return [(key, value)]
        while self.bytes + size > self.budget:
            oldest, old = self._kept.popitem(last=False)
            self.bytes -= self.size(old)
            gone.append((oldest, old))
        self.evictions += len(gone)
        self._kept[key] = value
        self.bytes += size
        return gone

    def pop(self, key: K) -> V | None:
        value = self._kept.pop(key, None)
        if value is not None:
            self.bytes -= self.size(value)
        return value

    def items(self) -> list[tuple[K, V]]:
        """Least recently used first."""
        return list(self._kept.items())


def own(tensor: Tensor) -> Tensor:
    """The tensor without its graph and contiguous; a copy where it is a view that would keep a larger buffer alive."""
    tensor = tensor.detach().contiguous()
    return tensor if tensor.untyped_storage().nbytes() == tensor.nbytes else tensor.clone()
