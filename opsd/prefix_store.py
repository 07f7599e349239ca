"""The teacher's computed prefixes, kept: on the device, in host memory, on disk.

    version = Version(model_identity(module))                    # frozen; Version(name, updates) where weights move
    key = PrefixKey.of(version, input_ids, media_digests)
    stored = store.get(key)                                      # None: compute it, then store.put(key, stored)

A tier keeps what was used last, within its budget in bytes; what has to go from the device goes to the host, and from
the host to the disk, if its version lasts. A hit moves a prefix up again. A prefix bigger than a tier's budget passes
it by. On a CPU device and host are the same memory: one tier.

With `engine.prefix_dtype` int8 or fp8 the tiers hold codes, and a prefix is what they stand for from the first time on:
`put` gives what `get` will give.

Whole prefixes only: a teacher's prompts differ from the first clip on, so there is no common part worth finding.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from opsd.byte_lru import ByteLru, own
from opsd.prefix_codes import decode, encode
from opsd.prefix_entry import PrefixKey, Stored, Version
from opsd.prefix_files import PrefixFiles
from opsd.sections import EngineConfig


class MemoryTier:
    """A ByteLru of prefixes, each brought to where the tier lives before it is kept."""

    def __init__(self, name: str, budget: int, bring: Callable[[Stored], Stored], size: Callable[[Stored], int]):
        self.name, self.bring = name, bring
        self.kept: ByteLru[PrefixKey, Stored] = ByteLru(budget, size)
        self.hits = 0

    def put(self, key: PrefixKey, stored: Stored) -> list[tuple[PrefixKey, Stored]]:
        """What falls out, oldest first; the prefix itself if it does not fit."""
        return self.kept.put(key, self.bring(stored)) if self.kept.fits(stored) else [(key, stored)]


class PrefixStore:
    """Tiers of memory, the fastest first, and files. Not for several threads at once."""

    def __init__(
        self, device: torch.device, memory: list[MemoryTier], files: PrefixFiles | None = None, dtype: str = "exact"
    ):
        self.device, self.memory, self.files, self.dtype = device, memory, files, dtype
        self._error: Tensor | None = None  # (2,) the largest of codes that were used
        self._disk_hits = self._misses = self._saved_tokens = 0

    def get(self, key: PrefixKey) -> Stored | None:
        """The prefix on the device, or None."""
        stored = self._from_memory(key) or self._from_disk(key)
        if stored is None:
            self._misses += 1
        else:
            self._saved_tokens += key.length
        return None if stored is None else self._as_found(stored)

    def put(self, key: PrefixKey, stored: Stored) -> Stored:
        """Keep a prefix that was computed just now, and give it as it will be found. Its tensors are the store's from
        here on: copies where they are slices of larger ones."""
        for tier in self.memory:
            tier.kept.pop(key)
        if self.dtype != "exact":
            stored = encode(stored, self.dtype)
        self._keep(key, stored.with_tensors([own(tensor) for tensor in stored.tensors()]))
        return self._as_found(stored)

    def drop_other_versions(self, version: Version) -> None:
        """Forget, at once, what other weights computed. Files stay: they hold frozen models, which other runs use."""
        for tier in self.memory:
            for key, _ in tier.kept.items():
                if key.version != version:
                    tier.kept.pop(key)

    def flush(self) -> None:
        """Write to disk what only memory holds, the last used last, so that another run finds it."""
        for tier in reversed(self.memory):
            for key, stored in tier.kept.items():
                self._write(key, stored)

    def metrics(self) -> dict[str, int]:
        """Sums since the start; bytes now. A few numbers of this process: no device, no disk is asked."""
        counts = {"misses": self._misses, "saved_tokens": self._saved_tokens}
        for tier in self.memory:
            counts[f"{tier.name}_hits"] = tier.hits
            counts[f"{tier.name}_evictions"] = tier.kept.evictions
            counts[f"{tier.name}_bytes"] = tier.kept.bytes
        if self.files is not None:
            counts["disk_hits"] = self._disk_hits
            for name in ("evictions", "bytes", "damaged", "abandoned", "failures"):
                counts[f"disk_{name}"] = getattr(self.files, name)
        return counts

    def errors(self) -> dict[str, float]:
        """The largest relative errors of keys and of values among the codes that were used; waits for the device."""
        return {} if self._error is None else dict(zip(("key_error", "value_error"), self._error.tolist(), strict=True))

    def _as_found(self, stored: Stored) -> Stored:
        if stored.error is None:
            return stored
        self._error = stored.error if self._error is None else torch.maximum(self._error, stored.error)
        return decode(stored)

    def _from_memory(self, key: PrefixKey) -> Stored | None:
        for level, tier in enumerate(self.memory):
            stored = tier.kept.get(key)
            if stored is not None:
                tier.hits += 1
                on_device = stored.to(self.device)
                if level > 0 and self.memory[0].kept.fits(on_device):
                    tier.kept.pop(key)
                    self._keep(key, on_device)
                return on_device
        return None

    def _from_disk(self, key: PrefixKey) -> Stored | None:
        stored = self.files.get(key) if self.files is not None and key.version.lasting else None
        if stored is None:
            return None
        self._disk_hits += 1
        on_device = stored.to(self.device)
        fast = self.memory[0].kept.fits(on_device)
        self._keep(key, on_device if fast else stored)
        return on_device

    def _keep(self, key: PrefixKey, stored: Stored) -> None:
        falling = [(key, stored)]
        for tier in self.memory:
            falling = [lower for upper in falling for lower in tier.put(*upper)]
        for item in falling:
            self._write(*item)

    def _write(self, key: PrefixKey, stored: Stored) -> None:
        if self.files is not None and key.version.lasting:
            if self.device.type == "cuda":  # copies to pinned memory may still be under way
                torch.cuda.synchronize(self.device)
            self.files.put(key, stored)


def open_store(config: EngineConfig, device: torch.device) -> PrefixStore | None:
    """The store of the config, or None for `engine.teacher_cache: none`. Raises InputError for a folder that cannot be
    written."""
    if config.teacher_cache == "none":
        return None
    host_budget = config.teacher_cache_host_mib * 2**20
    if device.type == "cpu":
        memory = [MemoryTier("host", host_budget, lambda stored: stored, _nbytes)]
    else:
        memory = [
            MemoryTier("device", config.teacher_cache_device_mib * 2**20, lambda stored: stored.to(device), _nbytes),
            MemoryTier("host", host_budget, _pinned, _pinned_bytes if device.type == "cuda" else _nbytes),
        ]
    files = None
    if config.teacher_cache == "disk":
        files = PrefixFiles(config.teacher_cache_dir, config.teacher_cache_disk_mib * 2**20)
    return PrefixStore(device, memory, files, config.prefix_dtype)


def _nbytes(stored: Stored) -> int:
    return stored.nbytes


def _pinned_bytes(stored: Stored) -> int:
    """torch rounds blocks of pinned memory up to powers of two."""
    return sum(1 << max(tensor.nbytes - 1, 0).bit_length() for tensor in stored.tensors())


def _pinned(stored: Stored) -> Stored:
    """In host memory, pinned where the prefix comes from CUDA; the copies are ordered by its stream."""

    def copy(tensor: Tensor) -> Tensor:
        if tensor.device.type == "cpu":
            return tensor
        host = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
        return host.copy_(tensor, non_blocking=tensor.is_cuda)

    return stored.with_tensors([copy(tensor) for tensor in stored.tensors()])
