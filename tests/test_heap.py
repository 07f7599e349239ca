"""Memory that small tensors freed stays with the process, that of large ones does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In a process of its own, as the setting is for the whole of it. Prints the page faults of four times 400 tensors of
# 192 KiB (or another size), after enough of them that aligned blocks have found room in those freed before, and the
# bytes that are resident, beyond the tensors, when freed ones of 1 to 15 MiB have made room for others like them.
CODE = """
import resource, torch
from opsd.heap import keep_freed_memory
assert {weights} is None or keep_freed_memory({weights})
faults = []
for _ in range(9):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    [torch.ones({kib} << 8) for _ in range(400)]
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[5:]))

def resident():
    return next(int(l.split()[1]) << 10 for l in open("/proc/self/status") if l.startswith("VmRSS"))
start = resident()
for _ in range(3):
    kept = [torch.ones(size << 18) for size in range(1, 16)]
    kept = [torch.ones(size << 18) for size in range(1, 16)] + kept[::2]
print(resident() - start - sum(x.nbytes for x in kept))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_freed_memory_stays_where_it_is_small_and_leaves_no_holes_where_it_is_large() -> None:
    (faults, holes), (_, usual) = _measured(1 << 30), _measured(None)
    assert faults < 100
    assert holes < 8 << 20 < usual


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_all_freed_memory_stays_where_the_model_is_small() -> None:
    (small, _), (large, _) = _measured(1 << 20, kib=512), _measured(1 << 30, kib=512)
    assert small < 100 < large


def _measured(weights: int | None, kib: int = 192) -> list[int]:
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    code = CODE.format(weights=weights, kib=kib)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return [int(line) for line in done.stdout.split()]
