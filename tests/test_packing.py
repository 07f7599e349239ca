"""Passes under a token budget: nothing lost, nothing split that need not be, no fuller pass refused."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opsd.packing import first_fit_decreasing, in_passes, units

SIZES = st.lists(st.integers(1, 12), max_size=12)


@given(sizes=SIZES, budget=st.integers(1, 20))
def test_every_item_once_and_no_bin_over_the_budget_but_of_one_item(sizes, budget):
    bins = first_fit_decreasing(sizes, budget)
    assert sorted(i for items in bins for i in items) == list(range(len(sizes)))
    assert all(len(items) == 1 or sum(sizes[i] for i in items) <= budget for items in bins)
    assert bins == sorted(bins) and all(items == sorted(items) for items in bins)
    loads = sorted(sum(sizes[i] for i in items) for items in bins)
    assert len(loads) < 2 or loads[0] + loads[1] > budget, "two bins that one would have held"


def test_the_largest_go_first_and_fill_a_bin_to_the_brim():
    assert first_fit_decreasing([3, 4, 6, 7], 10) == [[0, 3], [1, 2]]  # in order of index it would take three
    assert first_fit_decreasing([3, 25, 7], 10) == [[0, 2], [1]]


@given(
    groups=st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 6), max_size=5)), max_size=5),
    budget=st.integers(1, 30),
)
def test_responses_of_a_prompt_stay_together_where_they_fit(groups, budget):
    roots = [root for root, _ in groups]
    owners = [prompt for prompt, (_, lengths) in enumerate(groups) for _ in lengths]
    flat = [length for _, lengths in groups for length in lengths]
    made = units(roots, owners, flat, budget)
    assert [i for unit in made for i in unit.responses] == list(range(len(flat)))
    for unit in made:
        assert {owners[i] for i in unit.responses} == {unit.prompt}
        assert unit.tokens == roots[unit.prompt] + sum(flat[i] for i in unit.responses)
        assert len(unit.responses) == 1 or unit.tokens <= budget
    for prompt, (root, lengths) in enumerate(groups):
        of_prompt = [unit for unit in made if unit.prompt == prompt]
        assert len(of_prompt) == bool(lengths) if root + sum(lengths) <= budget else len(of_prompt) >= 1 or not lengths


@given(sizes=SIZES, budget=st.integers(1, 20))
def test_passes_keep_the_order_and_are_as_full_as_the_budget_allows(sizes, budget):
    runs = in_passes(range(len(sizes)), sizes, budget)
    assert [i for run in runs for i in run] == list(range(len(sizes))) and all(runs)
    loads = [sum(sizes[i] for i in run) for run in runs]
    assert all(load <= budget or len(run) == 1 for load, run in zip(loads, runs, strict=True))
    for load, after in zip(loads, runs[1:], strict=False):
        assert load + sizes[after[0]] > budget, "the next item had room in the pass before"
