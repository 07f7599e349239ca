"""The budgeted map, and the two caches that are little more than it."""

from __future__ import annotations

import torch

from opsd.byte_lru import ByteLru, own
from opsd.feature_cache import FeatureCache


def lru(budget: int) -> ByteLru[str, str]:
    return ByteLru(budget, len)


def test_the_least_recently_used_goes_first_and_only_as_many_as_must() -> None:
    kept = lru(6)
    assert kept.put("a", "11") == kept.put("b", "22") == kept.put("c", "33") == []
    assert kept.get("a") == "11"
    assert kept.put("d", "444") == [("b", "22"), ("c", "33")]
    assert (kept.bytes, kept.evictions, len(kept)) == (5, 2, 2)
    assert kept.items() == [("a", "11"), ("d", "444")]


def test_what_does_not_fit_at_all_falls_out_and_disturbs_nobody() -> None:
    kept = lru(3)
    kept.put("a", "11")
    assert not kept.fits("4444")
    assert kept.put("b", "4444") == [("b", "4444")]
    assert kept.get("a") == "11" and kept.evictions == 0
    assert kept.put("a", "4444") == [("a", "4444")], "an older value must not outlive the newer one"
    assert kept.get("a") is None and kept.bytes == 0


def test_a_value_put_again_counts_once() -> None:
    kept = lru(3)
    for value in ("1", "22", "333"):
        assert kept.put("a", value) == []
        assert kept.bytes == len(value)
    assert kept.pop("a") == "333" and kept.pop("a") is None and kept.bytes == 0


def test_own_copies_slices_and_nothing_else() -> None:
    whole = torch.arange(6.0, requires_grad=True)
    assert own(whole).data_ptr() == whole.data_ptr() and not own(whole).requires_grad
    for view in (whole[:3], torch.ones(2, 3).T, torch.ones(1).expand(4)):
        copy = own(view)
        assert torch.equal(copy, view) and copy.is_contiguous()
        assert copy.untyped_storage().nbytes() == copy.nbytes


def test_features_by_digest_of_their_medium() -> None:
    cache = FeatureCache(budget_mib=1)
    batch = torch.randn(8, 2**14)  # half a MiB
    assert cache.get("a") is None
    cache.put("a", batch[:4], batch[4:6])
    features = cache.get("a")
    assert features is not None and torch.equal(features[0], batch[:4]) and torch.equal(features[1], batch[4:6])
    cache.put("b", batch)
    cache.put("c", batch[:3])
    assert cache.get("a") is None and cache.get("b") is not None
    assert cache.metrics() == {"hits": 2, "misses": 2, "evictions": 1, "bytes": 11 * 2**16}
