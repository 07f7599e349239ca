"""Memory that tensors freed stays with the process."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# In a process of its own, as the setting is for the whole of it. Prints the page faults of ten tensors of 64 MiB, after
# enough of them that aligned blocks have found room in those freed before.
CODE = """
import resource, torch
from opsd.heap import keep_freed_memory
assert {keep} is None or keep_freed_memory()
faults = []
for _ in range(50):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(1 << 24)
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
print(sum(faults[40:]))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the allocator of glibc")
def test_a_freed_tensor_costs_no_page_faults_the_next_time() -> None:
    kept, given_back = (_faults(keep) for keep in (True, None))
    assert kept < 100 < given_back


def _faults(keep: bool | None) -> int:
    env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    done = subprocess.run([sys.executable, "-c", CODE.format(keep=keep)], capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)
