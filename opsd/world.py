"""The processes of a run: which rows are whose, and what they tell each other. One process is a world of one.

    torchrun --nproc-per-node 4 -m opsd.train cfg.yaml

Every process has every row and works on its share of a step. Token weights are those of the whole step, so gradients
and metrics of the processes add up to those of one process; nothing is averaged.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opsd.errors import InputError

T = TypeVar("T")
_BUCKET = 64 << 20  # bytes of gradients that travel together
_PATIENCE = timedelta(hours=2)  # the first process may be drawing, decoding or saving for the others


@dataclass(frozen=True)
class World:
    """Process `rank` of `size`; `local_rank` counts those of its machine. Every method with a size of one is free.

    Methods that exchange something have to be called by every process, in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def main(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[T]:
        """This process's items: every `size`-th, from the `rank`-th on."""
        return list(items[self.rank :: self.size])

    def gather(self, own: Sequence[T]) -> list[T]:
        """All items from everybody's share of them, in their order; items that pickle."""
        if self.size == 1:
            return list(own)
        shares: list[list[T]] = [[] for _ in range(self.size)]
        torch.distributed.all_gather_object(shares, list(own))
        return [shares[i % self.size][i // self.size] for i in range(sum(map(len, shares)))]

    def place(self, item: int) -> int:
        """Where the `item`-th of this process's share stands among all."""
        return self.rank + item * self.size

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the processes, in fp64; every process has the same names."""
        if self.size == 1:
            return dict(values)
        names = sorted(values)
        sums = torch.tensor([values[name] for name in names], dtype=torch.float64)
        torch.distributed.all_reduce(sums)
        return dict(zip(names, sums.tolist(), strict=True))

    def total(self, value: Tensor | float) -> Tensor | float:
        """The sum of the processes' tensors, where they lie: nobody waits for the device."""
        if self.size == 1 or not isinstance(value, Tensor):
            return value
        value = value.clone()
        torch.distributed.all_reduce(value)
        return value

    def largest(self, value: float) -> float:
        """The largest of the processes' values."""
        if self.size == 1:
            return value
        found = torch.tensor(value, dtype=torch.float64)
        torch.distributed.all_reduce(found, torch.distributed.ReduceOp.MAX)
        return found.item()

    def told(self, text: str) -> str:
        """The first process's text."""
        if self.size == 1:
            return text
        box = [text]
        torch.distributed.broadcast_object_list(box)
        return box[0]

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """The first process goes through the block, then the others; where it fails, they stop without a word."""
        if self.main:
            try:
                yield
            except BaseException:
                self.told("failed")
                raise
            self.told("done")
        elif self.told("") == "failed":
            raise SystemExit(2)
        else:
            yield

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace every gradient by the sum over the processes. A parameter that nobody used keeps none, and one that
        this process did not use counts as zero. FSDP2 has added up those of divided parameters."""
        if self.size == 1:
            return
        every = [p for p in parameters if not isinstance(p, DTensor)]
        used = torch.tensor([p.grad is not None for p in every], dtype=torch.int32)
        torch.distributed.all_reduce(used)
        chosen = [p for p, count in zip(every, used.tolist(), strict=True) if count]
        for p in chosen:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        for bucket in _buckets([p.grad for p in chosen if p.grad is not None]):
            flat = torch.cat([grad.flatten() for grad in bucket])
            torch.distributed.all_reduce(flat)
            parts = flat.split([grad.numel() for grad in bucket])
            torch._foreach_copy_(bucket, [part.view_as(grad) for part, grad in zip(parts, bucket, strict=True)])


@contextmanager
def joined() -> Iterator[World]:
    """The world that torchrun started this process in; a world of one elsewhere. Left at the end of the block."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield World()
        return
    try:
        world = World(*(int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))
    except (KeyError, ValueError) as error:
        raise InputError("RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them", str(error)) from error
    if torch.cuda.is_available():
        torch.cuda.set_device(world.local_rank)
    # what the host knows travels by gloo, what lies on a device by NCCL
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", timeout=_PATIENCE
    )
    try:
        yield world
    finally:
        torch.distributed.destroy_process_group()


def _buckets(gradients: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Gradients of one dtype, up to _BUCKET bytes together, in an order that all processes share."""
    bucket: list[Tensor] = []
    for grad in gradients:
        full = sum(other.nbytes for other in bucket) + grad.nbytes > _BUCKET
        if bucket and (full or grad.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(grad)
    if bucket:
        yield bucket
