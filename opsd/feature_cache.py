"""Outputs of frozen vision and audio towers, by the digest of the medium: rollout, teacher and student share them."""

from __future__ import annotations

from torch import Tensor

from opsd.byte_lru import ByteLru, own


class FeatureCache:
    """Features stay on the device they were computed on. A frozen tower is a function of its input: a hit is exact.

    Like every tensor that is shared, what comes out must not be written into.
    """

    def __init__(self, budget_mib: int):
        self._kept: ByteLru[str, tuple[Tensor, ...]] = ByteLru(budget_mib * 2**20, _size)
        self._hits = self._misses = 0

    def get(self, digest: str) -> tuple[Tensor, ...] | None:
        """The features of the medium with this `digests.media_digest`, or None."""
        features = self._kept.get(digest)
        self._hits += features is not None
        self._misses += features is None
        return features

    def put(self, digest: str, *features: Tensor) -> None:
        """One tensor, or several where a tower has side outputs (deepstack). A slice is copied off its batch."""
        self._kept.put(digest, tuple(own(feature) for feature in features))

    def metrics(self) -> dict[str, int]:
        """Sums since the start; bytes now."""
        kept = self._kept
        return {"hits": self._hits, "misses": self._misses, "evictions": kept.evictions, "bytes": kept.bytes}


def _size(features: tuple[Tensor, ...]) -> int:
    return sum(feature.nbytes for feature in features)
