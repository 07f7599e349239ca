"""A language-model head as data: what turns a hidden state into logits.

    z = softcap(scale * (hidden @ weight[:valid_vocab].T + bias[:valid_vocab])),   softcap(x) = c tanh(x / c)

Without a softcap the scale is a temperature and costs nothing. A softcap takes one pass over the logits, and one more
row of them in the workspace for its derivative 1 - (z / c)^2.

A head in slices (vocabulary parallel, as Megatron shards its output layer): rank r of a group holds rows
[offset_r, offset_r + sizes_r) of it, and every rank has the same hidden states, targets and upstream gradients.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from opsd_kernels import gemm
from opsd_kernels.scalars import check_between, is_whole

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class VocabShard:
    """Weight and bias are this rank's rows of a head that the ranks of `group` hold together, in order of rank.

    sizes: rows of every rank, padding included; None: as many on every rank as on this one.
    Raises ValueError for what is no process group, and where sizes are not one positive whole number per rank.
    """

    group: ProcessGroup
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not hasattr(self.group, "rank"):
            raise ValueError(f"expected a process group (torch.distributed.group.WORLD, say), got {self.group!r}")
        ranks, sizes = self.group.size(), self.sizes
        if sizes is not None and not (
            isinstance(sizes, Sequence) and len(sizes) == ranks and all(is_whole(size) and size > 0 for size in sizes)
        ):
            raise ValueError(f"expected {ranks} positive sizes, one per rank of the group, got {sizes!r}")

    def with_sizes(self, rows: int, valid_vocab: int | None = None) -> VocabShard:
        """With sizes, given this rank's rows, and without those from valid_vocab on."""
        sizes = (rows,) * self.group.size() if self.sizes is None else self.sizes
        starts = itertools.accumulate(sizes, initial=0)
        valid = sum(sizes) if valid_vocab is None else valid_vocab
        return replace(self, sizes=tuple(min(size, valid - start) for start, size in zip(starts, sizes, strict=False)))

    @property
    def start(self) -> int:
        """The first of this rank's rows."""
        return sum(self.known_sizes[: self.group.rank()])

    @property
    def rows(self) -> int:
        return self.known_sizes[self.group.rank()]

    @property
    def known_sizes(self) -> tuple[int, ...]:
        assert self.sizes is not None, "with_sizes() makes them known"
        return self.sizes


@dataclass(frozen=True)
class Head:
    """weight (V, D), bias (V,); scale multiplies logits, softcap c bounds them, rows from valid_vocab on are padding.

    Padding has no logits, no probability and a zero gradient; it is skipped by a view, the head is not copied.
    shard: weight and bias are a slice of them; valid_vocab counts rows of the whole.
    Raises ValueError for a scale or softcap that is no number from 1e-6 to 1e6, a valid_vocab that is not whole, a
    shard of another type. The rest is checked by fused_token_kl.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None
    shard: VocabShard | None = None

    def __post_init__(self) -> None:
        check_between("scale of the head", self.scale)
        if self.softcap is not None:
            check_between("softcap", self.softcap)
        if self.valid_vocab is not None and not is_whole(self.valid_vocab):
            raise ValueError(f"expected a whole valid_vocab or None, got {self.valid_vocab!r}")
        if self.shard is not None and not isinstance(self.shard, VocabShard):
            raise ValueError(f"expected shard as a VocabShard or None, got {type(self.shard).__name__}")

    @classmethod
    def of(cls, head: Head | Tensor) -> Head:
        if isinstance(head, cls):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        raise ValueError(f"expected a head as a tensor or a Head, got {type(head).__name__}")

    def to(self, dtype: torch.dtype) -> Head:
        """With weight and bias in a dtype, differentiably; themselves where they have it."""
        bias = None if self.bias is None else self.bias.to(dtype)
        return replace(self, weight=self.weight.to(dtype), bias=bias)

    def view(self) -> Head:
        """Without padding and without a graph; the memory is the same."""
        rows, shard = self.valid_vocab, self.shard
        if shard is not None:
            shard = shard.with_sizes(self.weight.shape[0], self.valid_vocab)
            rows = shard.rows
        bias = None if self.bias is None else self.bias.detach()[:rows]
        return Head(self.weight.detach()[:rows], bias, self.scale, self.softcap, shard=shard)

    @property
    def largest_slice(self) -> int:
        """Rows of a view, or the most that any rank has: what all ranks plan their chunks with."""
        return self.weight.shape[0] if self.shard is None else max(self.shard.known_sizes)

    @property
    def factor(self) -> float:
        """What is left of the scale for the temperature."""
        return self.scale if self.softcap is None else 1.0

    def equals(self, other: Head) -> bool:
        """The same function of a hidden state, in the same memory."""
        same = (self.scale, self.softcap) == (other.scale, other.softcap)
        return same and is_same(self.weight, other.weight) and is_same(self.bias, other.bias)

    def finish_(self, z: Tensor, slope: Tensor | None) -> None:
        """Products (n, V) to logits in place, but for the factor; fills slope = softcap'."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.mul_(float(self.scale / self.softcap)).tanh_()
            if slope is not None:
                torch.mul(z, z, out=slope).neg_().add_(1)
            z.mul_(float(self.softcap))

    def scratch_elements(self, budget: int) -> int:
        """fp32 elements of the widened block: none, all of it, or what the budget holds (one row at least)."""
        width = self.weight.shape[1]
        return max(width, min(self.largest_slice * width, budget)) if gemm.needs_widening(self.weight) else 0


def is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """None, the same tensor, or another view (a detached one, say) of the same memory."""
    if a is None or b is None or a is b:
        return a is b
    layouts = [(x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    # the storage itself: on meta every address is 0
    places = [(x.untyped_storage()._cdata, x.storage_offset()) for x in (a, b)]
    return layouts[0] == layouts[1] and places[0] == places[1]
