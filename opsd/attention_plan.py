"""Which queries meet which keys: a packed row cut into parts that one attention kernel call each can do.

Parts are made once per row and shared by the layers. For kernels that want rectangles, spans of like length are
stacked and padded with repeats of their last token; for ragged (varlen) kernels all spans of a kind are one part.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd.attention_rows import OneRow, Ragged, Rectangle, Rows
from opsd.packing import Packed, Span
from opsd.transfer import to_device

# Rectangles whose shortest span is at least this share of the longest are worth one call instead of two.
_FILL = 0.75
_SHORT = 48  # below so many tokens a call costs more than the padding


@dataclass(frozen=True)
class Part:
    """One kernel call. Row i of the queries meets row i of the keys."""

    queries: Rows
    keys: Rows
    causal: bool  # ends of queries and keys are aligned
    merged: bool  # into a part that already wrote these queries
    mask: Tensor | None = None  # (n, 1, 1 or L, L_keys) bool, rectangles only: which keys count
    window: int | None = None  # ragged only: keys at distance < window


Plan = list[Part]


def plan(packed: Packed, window: int | None, ragged: bool, device: torch.device) -> Plan:
    """Parts of a row. window: keys further back than this many tokens are not seen (None: all are)."""
    make = _ragged_parts if ragged else _rectangle_parts
    own, crossing = _pairs(packed, window)
    return make(own, window, device) + make(crossing, None, device, merged=True)


Pair = tuple[Span, list[Span]]  # a run of queries, and the spans of its keys one after another


def _pairs(packed: Packed, window: int | None) -> tuple[list[Pair], list[Pair]]:
    """Causal pairs, which come first and together hold every query; pairs of children with their whole root."""
    own: list[Pair] = []
    crossing: list[Pair] = []
    for tree, root, children in zip(packed.trees, packed.roots, packed.children, strict=True):
        fed = [child for child in children if child[1]]
        if not tree.stored and len(fed) == 1 and len(children) == 1:  # nothing is shared: one causal run
            whole = (root[0], root[1] + fed[0][1])
            own.append((whole, [whole]))
            continue
        if not tree.stored:
            own.append((root, [root]))
        if window is not None:  # a window is counted over root and child together: the tail it can reach comes along
            tail = min(root[1], window - 1)
            own += [(child, [(root[0] + root[1] - tail, tail), child] if tail else [child]) for child in fed]
            continue
        own += [(child, [child]) for child in fed]
        if fed:
            first, last = fed[0], fed[-1]
            crossing.append(((first[0], last[0] + last[1] - first[0]), [root]))
    return own, crossing


def _ragged_parts(pairs: list[Pair], window: int | None, device: torch.device, merged: bool = False) -> Plan:
    if not pairs:
        return []
    queries = Ragged([query for query, _ in pairs], device)
    lengths = [sum(length for _, length in spans) for _, spans in pairs]
    keys = Ragged([span for _, spans in pairs for span in spans], device, lengths)
    return [Part(queries, keys, causal=not merged, merged=merged, window=window)]


def _rectangle_parts(pairs: list[Pair], window: int | None, device: torch.device, merged: bool = False) -> Plan:
    parts = []
    for bucket in _buckets(pairs):
        queries = Rectangle([query for query, _ in bucket], device)
        if window is None and all(len(spans) == 1 for _, spans in bucket):
            keys = Rectangle([spans[0] for _, spans in bucket], device)
            hidden = merged and min(keys.lengths) < keys.width  # repeats of a root's last key must not be seen
            mask = keys.real[:, None, None, :] if hidden else None
            parts.append(Part(queries, keys, causal=not merged, merged=merged, mask=mask))
        else:
            parts += [_windowed(query, spans, window, device) for query, spans in bucket]
    return parts


def _windowed(query: Span, spans: list[Span], window: int | None, device: torch.device) -> Part:
    """One causal run whose keys reach back over its root's tail, with an explicit mask."""
    total = sum(length for _, length in spans)
    keys = OneRow(spans, device)
    place = torch.arange(query[1])[:, None] + total - query[1]
    distance = place - torch.arange(total)
    mask = (distance >= 0) & (distance < (window if window is not None else total))
    return Part(Rectangle([query], device), keys, causal=False, merged=False, mask=to_device(mask[None, None], device))


def _buckets(pairs: list[Pair]) -> list[list[Pair]]:
    """Pairs of like query and key lengths together; order within a bucket is the row's, so runs stay views."""
    width: Callable[[Pair], tuple[int, int]] = lambda pair: (pair[0][1], sum(n for _, n in pair[1]))  # noqa: E731
    buckets: list[list[Pair]] = []
    for pair in sorted(pairs, key=width, reverse=True):
        longest = width(buckets[-1][0]) if buckets else (0, 0)
        if buckets and all(_like(a, b) for a, b in zip(width(pair), longest, strict=True)):
            buckets[-1].append(pair)
        else:
            buckets.append([pair])
    return [sorted(bucket) for bucket in buckets]


def _like(length: int, longest: int) -> bool:
    return longest <= _SHORT or length >= _FILL * longest
