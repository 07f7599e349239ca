"""How much memory there is."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from opsd.errors import InputError

_UNITS = {"MiB": 2**20, "GiB": 2**30, "MB": 10**6, "GB": 10**9}


def parsed(text: str) -> int:
    """Bytes of `24GiB`, `512MiB`, `80GB`. Raises InputError."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([MG]i?B)", text.strip())
    if found is None or float(found[1]) == 0:
        raise InputError("a size such as 24GiB", repr(text), file="command line", field="--memory")
    return int(float(found[1]) * _UNITS[found[2]])


def available(device: torch.device) -> int:
    """Bytes this process may come to hold on the device: what is free, and what it holds already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    free = _kib(Path("/proc/meminfo"), "MemAvailable") + _kib(Path("/proc/self/status"), "VmRSS")
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text))
    return free


def resident() -> int:
    """Bytes of this process in host memory, which a plan comes on top of."""
    return _kib(Path("/proc/self/status"), "VmRSS")


def _kib(file: Path, name: str) -> int:
    """A line `name: N kB` in bytes; 0 where the system has no such file."""
    if not file.exists():
        return 0
    return next(int(line.split()[1]) << 10 for line in file.read_text().splitlines() if line.startswith(name))
