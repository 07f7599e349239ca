"""From a workspace budget to token chunks.

A chunk keeps all V columns. Two levels: `rows` tokens have their logits in memory at once; `grad_rows` of them
collect their gradients before the head-sized gradient GEMMs run, because accumulating an fp32 head gradient is bound
by memory below about a thousand rows. Where gradients overwrite the logits, or the head has no gradient, both levels
are the same.
"""

from dataclasses import dataclass

MAX_ROWS = 512
MAX_GRAD_ROWS = 2048
ALIGN = 128
MIB = 1 << 20


@dataclass(frozen=True)
class ChunkCosts:
    """Bytes that the workspace must hold: `fixed`, and what each logits row and each gradient row takes."""

    fixed: int
    row: int
    grad_row: int  # 0: gradients overwrite the logits


@dataclass(frozen=True)
class ChunkPlan:
    rows: int  # logits rows per chunk
    grad_rows: int  # rows per gradient GEMM, >= rows
    n: int

    def groups(self) -> list[tuple[int, int]]:
        """[start, stop) of each gradient GEMM."""
        return _spans(0, self.n, self.grad_rows)

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """[start, stop) of each logits chunk inside a group."""
        return _spans(start, stop, self.rows)

    def bytes(self, costs: ChunkCosts) -> int:
        return costs.fixed + self.rows * costs.row + self.grad_rows * costs.grad_row


def plan_chunks(
    n: int, costs: ChunkCosts, workspace_mib: float, collect: bool = True, most: int = MAX_ROWS
) -> ChunkPlan:
    """The largest chunks that fit the budget, capped where GEMMs stop gaining, balanced over n tokens.

    collect: whether there is a head gradient to collect rows for. most: logits rows where the budget has no say.
    Raises ValueError when not even one row fits.
    """
    room = int(workspace_mib * MIB) - costs.fixed
    ratio = MAX_GRAD_ROWS // MAX_ROWS if costs.grad_row and collect else 1
    fit = room // (costs.row + ratio * costs.grad_row)
    if fit < 1:
        ratio = 1
        fit = room // (costs.row + costs.grad_row)
    if fit < 1:
        need = (costs.fixed + costs.row + costs.grad_row) / MIB
        raise ValueError(f"expected workspace_mib >= {need:.2f} for one row of this vocabulary, got {workspace_mib}")
    rows = _aligned(min(fit, most))
    grad_rows = _balanced(n, rows * ratio)
    return ChunkPlan(rows=_balanced(min(n, grad_rows), rows), grad_rows=grad_rows, n=n)


def _aligned(rows: int) -> int:
    return rows - rows % ALIGN if rows >= ALIGN else rows


def _balanced(n: int, rows: int) -> int:
    """At most `rows`, such that the last chunk of n is not a sliver; a multiple of ALIGN where `rows` is one."""
    if n <= rows:
        return max(n, 1)
    even = -(-n // -(-n // rows))
    return min(rows, -(-even // ALIGN) * ALIGN)


def _spans(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    return [(i, min(i + size, stop)) for i in range(start, stop, size)]
