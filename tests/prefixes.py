"""Small computed prefixes for tests, each a function of its name."""

from __future__ import annotations

import torch

from opsd.prefix_entry import PrefixKey, Stored, Version

FROZEN = Version("model-a")


def key(name: int, version: Version = FROZEN, media: tuple[str, ...] = ("face",)) -> PrefixKey:
    return PrefixKey.of(version, torch.tensor([name, 7, 9]), media)


def stored(name: int, length: int = 3, dtype: torch.dtype = torch.float32) -> Stored:
    """2 layers of (2, length, 4)."""
    generator = torch.Generator().manual_seed(name)
    keys, values = (
        [torch.randn(2, length, 4, generator=generator).to(dtype) for _ in range(2)] for _ in ("keys", "values")
    )
    return Stored(keys, values, length + 1.25, torch.randn(8, generator=generator).to(dtype))


def same(found: Stored | None, expected: Stored) -> bool:
    """To the bit, dtypes included."""
    if found is None or found.next_position != expected.next_position:
        return False
    pairs = zip(found.tensors(), expected.tensors(), strict=True)
    return all(a.dtype == b.dtype and a.shape == b.shape and torch.equal(a, b) for a, b in pairs)
