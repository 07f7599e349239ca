"""Row kernel of a vocabulary in slices: rows_torch.py, whose reductions run over the ranks of a group.

Per slab: the student's maximum of each slice and the teacher there (one all-gather), the teacher's maxima, then the
sums of the statistics and those of the value (one all-reduce each). Every rank ends with the same results, and with
the gradient of its own columns. A slab has as many rows on every rank, whatever its slice.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from opsd_kernels import rows_torch
from opsd_kernels.divergence import Divergence
from opsd_kernels.heads import VocabShard
from opsd_kernels.rows import RowOutputs


@dataclass(frozen=True)
class GroupColumns:
    """The slice [start, ...) of the vocabulary, reduced with those of the other ranks."""

    group: dist.ProcessGroup
    start: int

    def centre(self, *tops: Tensor) -> list[Tensor]:
        mine = torch.stack(tops)
        slices = [torch.empty_like(mine) for _ in range(self.group.size())]
        dist.all_gather(slices, mine, group=self.group)
        every = torch.stack(slices)  # (ranks, tops, n, 1)
        owner = every[:, 0].argmax(dim=0)
        return [every[:, i].gather(0, owner[None])[0] for i in range(len(tops))]

    def max(self, x: Tensor) -> Tensor:
        top = x.amax(-1, keepdim=True)
        dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        return top

    def sum(self, *xs: Tensor) -> list[Tensor]:
        sums = torch.stack([x.sum(-1, keepdim=True) for x in xs])
        dist.all_reduce(sums, group=self.group)
        return list(sums)


@dataclass(frozen=True)
class ParallelRows:
    """elements: of the logits, handled at once; they bound the temporaries."""

    shard: VocabShard
    elements: int

    def scratch_bytes(self, vocab: int) -> int:
        return rows_torch.TEMPORARIES * 4 * max(self.elements, vocab)

    def run(
        self,
        z_s: Tensor,  # (n, V of this rank) fp32, consumed
        z_t: Tensor,  # (n, V of this rank) fp32, consumed; holds z_s - z_t when is_delta
        is_delta: bool,
        divergence: Divergence,
        scale: Tensor,  # (n,) fp32
        grad: Tensor | None,  # (n, V of this rank), may be z_s
        out: RowOutputs,
        tokens: Tensor | None = None,  # (n,) int64, of the whole vocabulary
    ) -> None:
        """As rows_torch.run, on every rank of the group."""
        columns = GroupColumns(self.shard.group, self.shard.start)
        for rows in rows_torch.slabs(len(z_s), max(self.shard.known_sizes), self.elements):
            target, sampled = (None if x is None else x[rows] for x in (grad, tokens))
            logits = rows_torch.Rows(z_s[rows], z_t[rows], is_delta)
            rows_torch.slab(logits, divergence, scale[rows], target, out.rows(rows), sampled, columns)
