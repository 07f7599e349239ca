"""Three tiers and one answer: the prefix that was put, to the bit, or None."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from opsd.byte_lru import ByteLru
from opsd.prefix_entry import PrefixKey, Stored, Version
from opsd.prefix_files import PrefixFiles, _file
from opsd.prefix_store import MemoryTier, PrefixStore, _pinned, _pinned_bytes, open_store
from opsd.sections import EngineConfig
from tests.prefixes import FROZEN, key, same, stored

CPU = torch.device("cpu")
ONE = stored(0).nbytes


def tier(name: str, budget: int) -> MemoryTier:
    return MemoryTier(name, budget, lambda prefix: prefix, lambda prefix: prefix.nbytes)


def make_store(device: int, host: int, folder: Path | None = None, disk: int = 2**20) -> PrefixStore:
    """Budgets of the memory tiers in prefixes of `ONE`; on a CPU a second tier is as good as another memory."""
    files = PrefixFiles(folder, disk) if folder is not None else None
    return PrefixStore(CPU, [tier("device", device * ONE), tier("host", host * ONE)], files)


def where(store: PrefixStore, name: int, version: Version = FROZEN) -> list[str]:
    """The tiers that hold a prefix; asking changes nothing."""
    held = [t.name for t in store.memory if key(name, version) in dict(t.kept.items())]
    return held + (["disk"] if store.files and store.files._path(key(name, version)).exists() else [])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_down_all_tiers_and_up_again_to_the_bit(tmp_path, dtype) -> None:
    store = make_store(1, 1, tmp_path)
    for name in (1, 2, 3):
        store.put(key(name), stored(name, 3 if dtype is torch.float32 else 6, dtype))
    assert [where(store, name) for name in (3, 2, 1)] == [["device"], ["host"], ["disk"]]
    for name in (1, 3, 2, 1):
        assert same(store.get(key(name)), stored(name, 3 if dtype is torch.float32 else 6, dtype))
        assert where(store, name)[0] == "device"
    assert store.get(key(9)) is None
    found = {name: count for name, count in store.metrics().items() if "hits" in name}
    assert found == {"device_hits": 0, "host_hits": 1, "disk_hits": 3}
    assert store.metrics()["misses"] == 1 and store.metrics()["saved_tokens"] == 4 * 3


def test_the_order_is_that_of_use() -> None:
    store = make_store(2, 1)
    store.put(key(1), stored(1))
    store.put(key(2), stored(2))
    store.get(key(1))
    store.put(key(3), stored(3))
    assert [where(store, name) for name in (1, 2, 3)] == [["device"], ["host"], ["device"]]
    store.get(key(2))
    assert [where(store, name) for name in (1, 2, 3)] == [["host"], ["device"], ["device"]]


def test_a_hit_moves_up_and_leaves_nothing_behind() -> None:
    store = make_store(1, 3)
    store.put(key(1), stored(1))
    store.put(key(2), stored(2))
    store.get(key(1))
    assert [where(store, name) for name in (1, 2)] == [["device"], ["host"]]


def test_a_hit_that_cannot_move_up_is_not_copied_down_again() -> None:
    store = make_store(1, 3)
    store.put(key(1), stored(1, length=6))
    store.memory[1].bring = lambda prefix: pytest.fail("copied to the host again")
    assert same(store.get(key(1)), stored(1, length=6))
    assert where(store, 1) == ["host"]


def test_what_is_bigger_than_a_tier_passes_it_by(tmp_path) -> None:
    store = make_store(1, 3, tmp_path)
    store.put(key(1), stored(1))
    store.put(key(2), stored(2, length=6))
    store.put(key(3), stored(3, length=60))
    assert [where(store, name) for name in (1, 2, 3)] == [["device"], ["host"], ["disk"]]
    for name, length in ((1, 3), (2, 6), (3, 60)):
        assert same(store.get(key(name)), stored(name, length))
    assert [where(store, name) for name in (1, 2, 3)] == [["device"], ["host"], ["disk"]]
    assert store.metrics()["device_evictions"] == store.metrics()["host_evictions"] == 0


def test_a_collision_of_hashes_is_a_miss(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(PrefixKey, "__hash__", lambda self: 1)
    monkeypatch.setattr(PrefixKey, "digest", "same")
    others = [key(2), key(1, media=("voice",)), key(1, Version("model-b")), key(1, Version("model-a", 0))]
    store = make_store(1, 1, tmp_path)
    store.put(key(1), stored(1))
    assert [store.get(other) for other in others] == [None] * 4
    store.flush()
    another_run = make_store(1, 1, tmp_path)
    assert [another_run.get(other) for other in others] == [None] * 4
    assert same(another_run.get(key(1)), stored(1))


def test_an_update_never_serves_what_older_weights_computed(tmp_path) -> None:
    store = make_store(1, 1, tmp_path)
    for updates in range(4):
        version = Version("ema", updates)
        assert store.get(key(1, version)) is None
        store.put(key(1, version), stored(updates))
        assert same(store.get(key(1, version)), stored(updates))
    assert store.get(key(1, Version("ema"))) is None
    store.flush()
    assert not list(tmp_path.glob("prefix-*")), "a count of updates means nothing to another run"


def test_other_versions_are_freed_at_once(tmp_path) -> None:
    store = make_store(2, 2, tmp_path)
    for name, updates in ((1, 0), (2, 0), (3, 1), (4, 0)):
        store.put(key(name, Version("ema", updates)), stored(name))
    store.drop_other_versions(Version("ema", 1))
    assert [where(store, name, Version("ema", 0)) for name in (1, 2, 4)] == [[], [], []]
    assert where(store, 3, Version("ema", 1)) == ["device"]
    assert store.metrics()["device_bytes"] == ONE and store.metrics()["host_bytes"] == 0


def test_another_run_finds_what_was_flushed(tmp_path) -> None:
    store = make_store(2, 2, tmp_path)
    for name in (1, 2, 3):
        store.put(key(name), stored(name))
    assert make_store(1, 1, tmp_path).get(key(1)) is None
    store.flush()
    another_run = make_store(1, 1, tmp_path)
    for name in (1, 2, 3):
        assert same(another_run.get(key(name)), stored(name))
    assert another_run.metrics()["disk_hits"] == 3


def test_slices_of_a_packed_batch_are_copied_off_it() -> None:
    store = make_store(1, 1)
    whole = replace(stored(1), keys=[t.repeat(1, 9, 1)[:, :3] for t in stored(1).keys])
    store.put(key(1), whole)
    found = store.get(key(1))
    assert found is not None and same(found, stored(1))
    assert all(t.untyped_storage().nbytes() == t.nbytes for t in found.tensors())


def test_a_prefix_is_one_entry_however_often_it_is_put() -> None:
    store = make_store(1, 2)
    store.put(key(1), stored(1))
    store.put(key(2), stored(2))  # 1 goes down
    store.put(key(1), stored(1))
    assert [where(store, name) for name in (1, 2)] == [["device"], ["host"]]


def test_the_store_of_a_config(tmp_path) -> None:
    assert open_store(EngineConfig(teacher_cache="none"), CPU) is None
    memory = open_store(EngineConfig(teacher_cache="memory", teacher_cache_host_mib=3), CPU)
    assert memory is not None and memory.files is None
    assert [(t.name, t.kept.budget) for t in memory.memory] == [("host", 3 * 2**20)]
    config = EngineConfig(teacher_cache="disk", teacher_cache_device_mib=1, teacher_cache_dir=tmp_path / "new")
    disk = open_store(config, torch.device("meta"))  # any device that is not the host
    assert disk is not None and disk.files is not None and (tmp_path / "new").is_dir()
    assert [(t.name, t.kept.budget) for t in disk.memory] == [("device", 2**20), ("host", 4096 * 2**20)]


def test_pinned_blocks_count_as_torch_rounds_them() -> None:
    prefix = Stored([torch.zeros(1, 5, 1)], [torch.zeros(1, 4, 1)], 5, torch.zeros(0))
    assert _pinned_bytes(prefix) == 32 + 16 + 1
    assert same(_pinned(prefix), prefix)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory and a device tier need CUDA")
def test_cuda_down_to_pinned_memory_and_disk_and_up_again(tmp_path) -> None:
    device = torch.device("cuda", torch.cuda.current_device())
    config = EngineConfig(teacher_cache="disk", teacher_cache_device_mib=1, teacher_cache_dir=tmp_path)
    store = open_store(config, device)
    assert store is not None
    store.memory[0].kept.budget, store.memory[1].kept.budget = ONE, 2 * ONE
    prefixes = {name: stored(name).to(device) for name in range(6)}
    for name, prefix in prefixes.items():
        store.put(key(name), prefix)
    assert where(store, 5) == ["device"] and where(store, 4) == ["host"] and where(store, 0) == ["disk"]
    (host,) = [p for k, p in store.memory[1].kept.items() if k == key(4)]
    assert all(tensor.is_pinned() for tensor in host.tensors())
    for name, prefix in prefixes.items():
        assert same(store.get(key(name)), prefix)


SIZES = [1, 3, 3, 6, 9, 60]  # lengths: the last two do not fit the device, the last one not the host either
VERSIONS = [FROZEN, Version("ema", 1), Version("ema", 2)]


def prefix_of(name: int, version: int) -> Stored:
    return stored(name + 10 * version, SIZES[name])


class Watched(ByteLru[PrefixKey, Stored]):
    """Its budget holds at every single change."""

    def __setattr__(self, name: str, value: object) -> None:
        super().__setattr__(name, value)
        if name == "bytes":
            assert 0 <= value <= self.budget  # type: ignore[operator]


class Tiers(RuleBasedStateMachine):
    """The store against lists, least recently used first: where each prefix is, and so which get is a hit."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        sizes = [prefix_of(name, 0).nbytes for name in range(len(SIZES))]
        files = [_file(key(name), prefix_of(name, 0)).size for name in range(len(SIZES))]
        self.budgets = [2 * ONE, 4 * ONE, 3 * max(files[:5]) // 2]
        self.sizes = [sizes, sizes, files]
        self.store = make_store(2, 4, self.folder, self.budgets[2])
        for tier in self.store.memory:
            tier.kept = Watched(tier.kept.budget, tier.kept.size)
        self.tiers: list[list[tuple[int, int]]] = [[], [], []]

    def teardown(self) -> None:
        shutil.rmtree(self.folder)

    def keep(self, level: int, item: tuple[int, int]) -> None:
        """Into the tier at `level`, or past it; what it pushes out goes one down."""
        if level == 2 and item[1] != 0:
            return
        if level == 2 and item in self.tiers[2]:
            self.tiers[2].remove(item)
        size = self.sizes[level]
        if size[item[0]] > self.budgets[level]:
            if level < 2:
                self.keep(level + 1, item)
            return
        kept = self.tiers[level]
        gone = []
        while sum(size[name] for name, _ in kept) + size[item[0]] > self.budgets[level]:
            gone.append(kept.pop(0))
        kept.append(item)
        for other in gone if level < 2 else []:
            self.keep(level + 1, other)

    @rule(name=st.sampled_from(range(6)), version=st.sampled_from([0, 0, 1, 2]))
    def put(self, name: int, version: int) -> None:
        self.store.put(key(name, VERSIONS[version]), prefix_of(name, version))
        for kept in self.tiers[:2]:
            if (name, version) in kept:
                kept.remove((name, version))
        self.keep(0, (name, version))

    @rule(name=st.sampled_from(range(6)), version=st.sampled_from([0, 0, 1, 2]))
    def get(self, name: int, version: int) -> None:
        found = self.store.get(key(name, VERSIONS[version]))
        item = (name, version)
        level = next((level for level, kept in enumerate(self.tiers) if item in kept), None)
        if level is None:
            assert found is None
            return
        assert same(found, prefix_of(name, version))
        kept = self.tiers[level]
        kept.append(kept.pop(kept.index(item)))
        if level == 2 or (level == 1 and self.sizes[0][name] <= self.budgets[0]):
            if level == 1:
                kept.remove(item)
            self.keep(0, item)

    @rule(version=st.sampled_from([0, 1, 2]))
    def drop(self, version: int) -> None:
        self.store.drop_other_versions(VERSIONS[version])
        self.tiers[:2] = [[item for item in kept if item[1] == version] for kept in self.tiers[:2]]

    @rule()
    def flush(self) -> None:
        self.store.flush()
        for item in [*self.tiers[1], *self.tiers[0]]:
            self.keep(2, item)

    @rule(name=st.sampled_from(range(6)))
    def damage(self, name: int) -> None:
        assert self.store.files is not None
        path = self.store.files._path(key(name))
        if path.exists():
            path.write_bytes(path.read_bytes()[:-1])
            before = self.store.files.damaged
            assert self.store.files.get(key(name)) is None and self.store.files.damaged == before + 1
            self.tiers[2].remove((name, 0))

    @invariant()
    def everything_is_where_the_lists_say(self) -> None:
        for tier, kept in zip(self.store.memory, self.tiers, strict=False):
            assert [k for k, _ in tier.kept.items()] == [key(name, VERSIONS[version]) for name, version in kept]
            assert tier.kept.bytes == sum(prefix.nbytes for _, prefix in tier.kept.items()) <= tier.kept.budget
        assert self.store.files is not None
        names = {path.name for path in self.folder.glob("prefix-*")}
        assert names == {self.store.files._path(key(name)).name for name, _ in self.tiers[2]}
        assert sum(path.stat().st_size for path in self.folder.iterdir()) <= self.budgets[2]


TestTiers = Tiers.TestCase
TestTiers.settings = settings(max_examples=60, stateful_step_count=30, deadline=None)
