"""The disk tier: exact, shared, and a disk that fails costs hits only."""

from __future__ import annotations

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from opsd.errors import InputError
from opsd.prefix_entry import PrefixKey, Version
from opsd.prefix_files import PrefixFiles, _file
from opsd.tensor_file import TensorFile
from tests.prefixes import FROZEN, key, same, stored

MIB = 2**20


def on_disk(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name != ".lock")


def counts(files: PrefixFiles) -> dict[str, int]:
    return {name: getattr(files, name) for name in ("evictions", "damaged", "abandoned", "failures")}


def in_another_process(code: str, folder: Path) -> subprocess.Popen[bytes]:
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path), OMP_NUM_THREADS="1")
    before = "import os, signal, sys; from pathlib import Path; from opsd.prefix_files import PrefixFiles\n"
    before += "from tests.prefixes import *\n"
    return subprocess.Popen([sys.executable, "-c", before + code, str(folder)], env=env)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_run_finds_the_same_bits(tmp_path, dtype) -> None:
    PrefixFiles(tmp_path, MIB).put(key(1), stored(1, dtype=dtype))
    files = PrefixFiles(tmp_path, MIB)
    assert same(files.get(key(1)), stored(1, dtype=dtype))
    assert files.bytes == sum(path.stat().st_size for path in tmp_path.iterdir()) > 0


@pytest.mark.parametrize("other", [key(2), key(1, Version("model-b")), key(1, media=("voice",))])
def test_a_collision_of_digests_is_a_miss(tmp_path, monkeypatch, other) -> None:
    monkeypatch.setattr(PrefixKey, "digest", "same")
    files = PrefixFiles(tmp_path, MIB)
    files.put(key(1), stored(1))
    assert files.get(other) is None
    assert same(files.get(key(1)), stored(1)), "the other prefix must stay"


@pytest.mark.parametrize("damage", ["flip", "truncate", "empty"])
def test_a_damaged_file_is_a_miss_counted_and_removed(tmp_path, damage) -> None:
    files = PrefixFiles(tmp_path, MIB)
    files.put(key(1), stored(1))
    path = files._path(key(1))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes({"flip": content, "truncate": content[:-40], "empty": b""}[damage])
    assert files.get(key(1)) is None and not path.exists()
    assert files.get(key(1)) is None
    assert counts(files) == {"evictions": 0, "damaged": 1, "abandoned": 0, "failures": 0}
    files.put(key(1), stored(1))
    assert same(files.get(key(1)), stored(1))


def test_a_whole_file_of_another_kind_is_damaged_too(tmp_path) -> None:
    files = PrefixFiles(tmp_path, MIB)
    TensorFile({"a": torch.ones(1)}, {}).write(files._path(key(1)))
    assert files.get(key(1)) is None and files.damaged == 1


def test_room_is_made_before_writing_in_order_of_use_by_any_process(tmp_path, monkeypatch) -> None:
    size = _file(key(1), stored(1)).size
    files, other = PrefixFiles(tmp_path, 3 * size), PrefixFiles(tmp_path, 3 * size)
    check_budget_while_writing(monkeypatch, files)
    for name in (1, 2, 3):
        files.put(key(name), stored(name))
    other.get(key(1))
    other.put(key(2), stored(2))  # already there: used, not written
    files.put(key(4), stored(4))
    assert [files.get(key(name)) is not None for name in (1, 2, 3, 4)] == [True, True, False, True]
    files.put(key(5), stored(5, length=99))  # bigger than the budget
    assert counts(files) == {"evictions": 1, "damaged": 0, "abandoned": 0, "failures": 0}
    assert files.bytes == 3 * size
    assert PrefixFiles(tmp_path, size).bytes == size, "a smaller budget holds from the start"


def check_budget_while_writing(monkeypatch: pytest.MonkeyPatch, files: PrefixFiles) -> None:
    write = TensorFile.write

    def checked(self: TensorFile, path: Path) -> None:
        write(self, path)
        assert sum(p.stat().st_size for p in files.folder.iterdir()) <= files.budget

    monkeypatch.setattr(TensorFile, "write", checked)


def test_files_of_others_in_the_folder_are_left_alone(tmp_path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"x" * 100)
    files = PrefixFiles(tmp_path, 10)
    files.put(key(1), stored(1))
    assert on_disk(tmp_path) == ["model.safetensors"] and files.evictions == 0


def test_a_writer_killed_half_way_leaves_nothing_that_is_found(tmp_path) -> None:
    files = PrefixFiles(tmp_path, MIB)
    files.put(key(1), stored(1))
    kill = "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
    put = "PrefixFiles(Path(sys.argv[1]), 2**20).put(key(2), stored(2))"
    assert in_another_process(kill + put, tmp_path).wait() == -signal.SIGKILL
    assert ".writing" in on_disk(tmp_path)
    assert same(files.get(key(1)), stored(1)) and files.get(key(2)) is None
    files.put(key(2), stored(2))
    assert same(files.get(key(2)), stored(2)) and files.abandoned == 1
    assert ".writing" not in on_disk(tmp_path)
    (tmp_path / ".writing").write_bytes(b"half")
    assert PrefixFiles(tmp_path, MIB).abandoned == 1 and ".writing" not in on_disk(tmp_path)


def test_two_processes_share_folder_and_budget(tmp_path, monkeypatch) -> None:
    files = PrefixFiles(tmp_path, 4 * _file(key(1), stored(1)).size)
    check_budget_while_writing(monkeypatch, files)
    code = """
files = PrefixFiles(Path(sys.argv[1]), int(BUDGET))
for i in range(300):
    found = files.get(key(i % 7))
    assert found is None or same(found, stored(i % 7))
    files.put(key(i % 5), stored(i % 5))
assert not files.failures and not files.damaged and not files.abandoned
"""
    other = in_another_process(code.replace("BUDGET", str(files.budget)), tmp_path)
    i = 0
    while other.poll() is None:
        i += 1
        found = files.get(key(i % 7))
        assert found is None or same(found, stored(i % 7))
        files.put(key(i % 7), stored(i % 7))
    assert other.returncode == 0
    assert not files.failures and not files.damaged and not files.abandoned


def test_a_file_another_process_removes_while_it_is_put_is_written_again(tmp_path, monkeypatch) -> None:
    """Between looking for the file and touching it, and between reading it and touching it."""
    files = PrefixFiles(tmp_path, MIB)
    files.put(key(1), stored(1))
    utime = os.utime

    def evicted_first(path: Path, ns: tuple[int, int]) -> None:
        if path.name != ".writing":
            path.unlink(missing_ok=True)
        utime(path, ns=ns)

    monkeypatch.setattr(os, "utime", evicted_first)
    files.put(key(1), stored(1))
    assert same(files.get(key(1)), stored(1)) and files.get(key(1)) is None
    assert counts(files) == {"evictions": 0, "damaged": 0, "abandoned": 0, "failures": 0}


def test_a_folder_deleted_in_between_is_counted_told_once_and_made_again(tmp_path, caplog) -> None:
    files = PrefixFiles(tmp_path / "cache", MIB)
    files.put(key(1), stored(1))
    for _ in range(2):
        shutil.rmtree(tmp_path / "cache")
        assert files.get(key(1)) is None
        files.put(key(1), stored(1))
        assert same(files.get(key(1)), stored(1))
    assert counts(files) == {"evictions": 0, "damaged": 0, "abandoned": 0, "failures": 2}
    assert len(caplog.records) == 1 and str(tmp_path / "cache") in caplog.text


def test_a_disk_that_takes_no_more_costs_hits_only(tmp_path, caplog) -> None:
    files = PrefixFiles(tmp_path, MIB)
    files.put(key(1), stored(1))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with caplog.at_level(logging.WARNING):
            files.put(key(2), stored(2))
            files.put(key(3), stored(3))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert files.failures == 2 and len(caplog.records) == 1
    assert len(on_disk(tmp_path)) == 1, "half a file is taken away at once"
    files.put(key(2), stored(2))
    assert same(files.get(key(1)), stored(1)) and same(files.get(key(2)), stored(2))


def test_a_file_that_cannot_be_read_is_a_miss(tmp_path) -> None:
    files = PrefixFiles(tmp_path, MIB)
    files._path(key(1)).mkdir()
    assert files.get(key(1)) is None and files.failures == 1


def test_a_folder_that_cannot_be_written_is_said_at_the_start(tmp_path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"cache: field 'engine.teacher_cache_dir': expected a folder that can be wr"):
        PrefixFiles(tmp_path / "file" / "cache", MIB)


def test_only_frozen_models_have_no_count() -> None:
    assert FROZEN.lasting and not Version("model-a", 0).lasting
