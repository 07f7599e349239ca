"""Many prompts and their responses as one row of tokens, nothing padded, every shared prompt in it once.

A packed row is a list of trees of depth one: a root (a prompt) and its children (the responses fed to the model). A
child's tokens see their whole root and themselves causally; roots see themselves causally. A root may be missing from
the row: then its keys and values come from an earlier pass (`stored`) and only its children are computed.

Letters: S tokens of the row, P prompt, T response, G responses per prompt, N response tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
Span = tuple[int, int]  # first token, number of tokens


def tokens_of(spans: Sequence[Span]) -> Tensor:
    """Every token of the spans, one span after another: int64, on the host."""
    first, lengths = torch.tensor(spans, dtype=torch.long).reshape(-1, 2).unbind(1)
    before = lengths.cumsum(0) - lengths  # tokens of the spans before each
    return torch.arange(sum(length for _, length in spans)) + (first - before).repeat_interleave(lengths)


@dataclass(frozen=True)
class Tree:
    """Lengths of one prompt and of its responses."""

    root: int  # P >= 1
    responses: tuple[int, ...] = ()  # T of each, >= 0
    stored: bool = False  # the root is not in the row

    @property
    def children(self) -> tuple[int, ...]:
        """Tokens fed per response: its last token predicts nothing."""
        return tuple(max(length - 1, 0) for length in self.responses)


@dataclass(frozen=True)
class Packed:
    """Where everything lies. Positions of keys count the row first, then the stored roots one after another."""

    trees: tuple[Tree, ...]

    @cached_property
    def length(self) -> int:
        """S, the tokens that are computed."""
        return sum((0 if tree.stored else tree.root) + sum(tree.children) for tree in self.trees)

    @cached_property
    def roots(self) -> list[Span]:
        """Every root, in key positions."""
        spans, row, stored = [], 0, self.length
        for tree in self.trees:
            spans.append((stored if tree.stored else row, tree.root))
            row += sum(tree.children) + (0 if tree.stored else tree.root)
            stored += tree.root if tree.stored else 0
        return spans

    @cached_property
    def children(self) -> list[list[Span]]:
        """What is fed of every response, in row positions, tree by tree."""
        spans, first = [], 0
        for tree in self.trees:
            first += 0 if tree.stored else tree.root
            of_tree = []
            for length in tree.children:
                of_tree.append((first, length))
                first += length
            spans.append(of_tree)
        return spans

    @cached_property
    def predicting(self) -> list[Span]:
        """Rows whose states predict the responses, token by token: the root's last one, then the fed ones.

        A stored root's last state counts as row S + j, j its number among the stored roots.
        """
        spans, stored = [], 0
        for tree, (start, length), of_tree in zip(self.trees, self.roots, self.children, strict=True):
            last = self.length + stored if tree.stored else start + length - 1
            stored += tree.stored
            for total, child in zip(tree.responses, of_tree, strict=True):
                spans += [(last, 1), child] if total else []
        return spans

    @property
    def padded_length(self) -> int:
        """Tokens a padded loop computes for the same responses: each with its prompt, all as long as the longest."""
        whole = [tree.root + fed for tree in self.trees for fed in tree.children]
        return len(whole) * max(whole, default=0)


@dataclass(frozen=True)
class Unit:
    """A prompt of the step and some of its responses: what is never split further."""

    prompt: int
    responses: tuple[int, ...]
    tokens: int  # P + sum of T


def units(prompt_lengths: Sequence[int], owners: Sequence[int], lengths: Sequence[int], budget: int) -> list[Unit]:
    """One unit per prompt, its responses together; a prompt whose responses pass the budget gets several units.

    owners: the prompt of every response. The prompt is then computed once per unit. A unit of one response may be
    larger than the budget: nothing is cut.
    """
    made = []
    for prompt, root in enumerate(prompt_lengths):
        mine = [i for i, owner in enumerate(owners) if owner == prompt]
        open_: list[int] = []
        tokens = root
        for i in mine:
            if open_ and tokens + lengths[i] > budget:
                made.append(Unit(prompt, tuple(open_), tokens))
                open_, tokens = [], root
            open_.append(i)
            tokens += lengths[i]
        if open_:
            made.append(Unit(prompt, tuple(open_), tokens))
    return made


def in_passes(items: Sequence[T], sizes: Sequence[int], budget: int) -> list[list[T]]:
    """The items in their order, in runs whose sizes sum to at most the budget; a larger item is alone."""
    runs: list[list[T]] = []
    room = 0
    for item, size in zip(items, sizes, strict=True):
        if not runs or size > room:
            runs.append([])
            room = budget
        runs[-1].append(item)
        room -= size
    return runs


def first_fit_decreasing(sizes: Sequence[int], budget: int) -> list[list[int]]:
    """Bins of indices whose sizes sum to at most the budget (a larger item is alone), by first fit, largest first.

    At most 11/9 of the fewest bins, plus one (Dosa, 2007). Items of a bin, and bins, stay in order of their index.
    """
    bins: list[list[int]] = []
    space: list[int] = []
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        place = next((b for b, room in enumerate(space) if sizes[i] <= room), None)
        if place is None:
            place = len(bins)
            bins.append([])
            space.append(budget)
        bins[place].append(i)
        space[place] -= sizes[i]
    return sorted(sorted(items) for items in bins)
