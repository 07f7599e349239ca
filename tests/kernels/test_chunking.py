"""Chunk plans: inside the budget, over every token once, balanced."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opsd_kernels.chunking import ALIGN, MAX_ROWS, MIB, ChunkCosts, plan_chunks


@given(
    n=st.integers(0, 20_000),
    row=st.integers(1_000, 2_000_000),
    grad_row=st.sampled_from([0, 1_000, 500_000]),
    mib=st.integers(8, 4_000),
)
def test_plan(n, row, grad_row, mib):
    costs = ChunkCosts(fixed=MIB, row=row, grad_row=grad_row)
    plan = plan_chunks(n, costs, mib)
    assert plan.bytes(costs) <= mib * MIB
    assert plan.grad_rows >= plan.rows
    tokens = [i for group in plan.groups() for span in plan.chunks(*group) for i in range(*span)]
    assert tokens == list(range(n))
    assert max(stop - start for group in plan.groups() for start, stop in plan.chunks(*group)) if n else True
    if not grad_row:
        assert plan.rows == plan.grad_rows


def test_published_sizes():
    """V = 151936 in bf16: 512 logits rows, 2048 gradient rows, 1187 MiB."""
    costs = ChunkCosts(fixed=0, row=8 * 151936, grad_row=2 * 151936)
    plan = plan_chunks(8192, costs, 1200)
    assert (plan.rows, plan.grad_rows) == (512, 2048)
    assert round(plan.bytes(costs) / MIB) == 1187
    frozen = plan_chunks(8192, costs, 1200, collect=False)
    assert (frozen.rows, frozen.grad_rows) == (512, 512)
    assert round(frozen.bytes(costs) / MIB) == 742


def test_many_chunks_are_aligned():
    plan = plan_chunks(900, ChunkCosts(fixed=0, row=MIB, grad_row=0), 300)
    assert plan.rows == plan.grad_rows == 2 * ALIGN


def test_a_chunk_of_a_group_is_no_sliver():
    """Of at most 512: 520 gradient rows make 384 and 136, not 512 and 8; 1152 of 2100 make three times 384."""
    costs = ChunkCosts(fixed=0, row=1000, grad_row=100)
    for n, expected in ((520, [384, 136]), (2100, [384, 384, 384])):
        plan = plan_chunks(n, costs, 1000)
        assert [stop - start for start, stop in plan.chunks(*plan.groups()[0])] == expected


def test_where_only_one_gradient_row_fits_each_logits_row():
    costs = ChunkCosts(fixed=0, row=MIB, grad_row=MIB)
    plan = plan_chunks(100, costs, 4.5)
    assert (plan.rows, plan.grad_rows) == (2, 2)
    assert plan.bytes(costs) <= 4.5 * MIB


@pytest.mark.parametrize("n", [513, 520, 1030, 5000])
def test_last_chunk_is_no_sliver(n):
    plan = plan_chunks(n, ChunkCosts(fixed=0, row=1000, grad_row=0), 1000)
    sizes = [stop - start for start, stop in plan.groups()]
    assert max(sizes) <= MAX_ROWS
    assert all(size % ALIGN == 0 for size in sizes[:-1])
    assert sizes[-1] > ALIGN // 8


def test_no_room_for_a_row():
    with pytest.raises(ValueError, match=r"expected workspace_mib >= 2\.00"):
        plan_chunks(4, ChunkCosts(fixed=MIB, row=MIB, grad_row=0), 1.5)
