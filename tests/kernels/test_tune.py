"""The tuner without a device: what it tries, what it keeps, what it prints. Nothing is timed."""

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 only")
from opsd_kernels import launch as table
from opsd_kernels import tune
from opsd_kernels.launch import Launch, Tile, Where

ENV = {"PYTHONPATH": str(Path(__file__).parents[2] / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
KERNELS = ("statistics", "terms", "gradient")
START = Launch.of(Tile(1024, 4), splits=8)
BEST = Launch(16, Tile(2048, 8), Tile(512, 4), Tile(4096, 8, 3))


def distance(name, launch):
    """Least at BEST; one tile must not be used."""
    tile, goal = getattr(launch, name), getattr(BEST, name)
    if tile == Tile(4096, 8):
        return math.inf
    away = abs(math.log2(tile.columns / goal.columns)) + (tile.warps != goal.warps) + (tile.stages != goal.stages)
    return 1 + away + abs(math.log2(launch.splits / BEST.splits))


def test_finds_the_best_of_every_kernel_and_of_the_splits():
    found = tune.search(KERNELS, START, distance, seconds=math.inf)
    assert found.launch == BEST
    assert (found.before, found.after) == (sum(distance(k, START) for k in KERNELS), 3.0)
    assert found.complete
    assert found.tried <= 1 + len(KERNELS) * len(tune.TILES) + len(tune.SPLITS)


def test_never_keeps_what_is_not_faster_and_stops_in_time():
    assert tune.search(KERNELS, START, lambda name, launch: 1.0, math.inf).launch == START
    bad_start = replace(START, statistics=Tile(4096, 8))
    assert tune.search(KERNELS, bad_start, distance, math.inf).launch == BEST
    now = iter(range(100))
    found = tune.search(KERNELS, START, distance, seconds=3, clock=lambda: next(now))
    assert not found.complete
    assert found.tried == 3


def test_a_printed_row_is_the_row():
    where = Where(90, 131072, "bfloat16", "jsd")
    text = tune.line(where, tune.Found(BEST, 2e-3, 1e-3, 40, complete=False))
    assert text.endswith("# 2.000 -> 1.000 ms for 512 rows, 40 launches tried, out of time")
    pasted = eval("{" + text + "\n}", {"Where": Where, "Launch": Launch, "Tile": Tile})
    assert pasted == {where: BEST}
    assert (tune.bucket(151936), tune.bucket(131072), tune.bucket(131071)) == (131072, 131072, 65536)


def test_candidates_are_launches_that_the_kernels_take():
    for tile in tune.TILES:
        assert tile.columns % (128 * tile.warps) == 0
    assert {f"clipped {kind}" for kind in tune.KINDS} | set(tune.KINDS) == set(tune.DIVERGENCES)
    assert all(t in tune.TILES for row in table.TABLE.values() for t in (row.statistics, row.terms, row.gradient))


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_offline_says_what_a_candidate_takes(monkeypatch):
    monkeypatch.setattr(tune, "TILES", (Tile(2048, 8, 3), Tile(16384, 4)))
    first, second, *_ = tune.offline(90, 151936, "bfloat16", "forward_kl")
    assert first.startswith("sm_90 forward_kl statistics Tile(columns=2048, warps=8, stages=3): ")
    assert " registers, 32" in first  # KiB of tiles under way
    assert "spills" in second


def test_without_a_device_it_says_so():
    command = [sys.executable, "-m", "opsd_kernels.tune"]
    done = subprocess.run(command, capture_output=True, text=True, env=ENV)
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
