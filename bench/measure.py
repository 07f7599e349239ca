"""Seconds and bytes of one step, on a CPU and on CUDA."""

import statistics
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from opsd_kernels.memory import keep_workspace


def peak_extra_bytes(step: Callable[[], None], device: str) -> int:
    """Highest amount of tensor memory held during a step above what is left when it ends (results, gradients).

    CUDA: max_memory_allocated. CPU: the profiler's log of allocations by torch; what C++ code allocates for itself
    outside of torch is not in it.
    """
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        step()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated()
    kept = keep_workspace(False)  # one that is there already would not be counted
    try:
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            step()
    finally:
        keep_workspace(kept)
    results: Any = profile.profiler
    events = [e for e in results.kineto_results.events() if e.name() == "[memory]"]
    held = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak - held


def interleaved(
    steps: dict[str, Callable[[], None]], rounds: int, seconds: float = float("inf"), again: bool = False
) -> dict[str, list[float]]:
    """Seconds of each step by name, one of each in turn, on CUDA by events. Stops early when `seconds` are spent.

    again: every step runs twice in its turn, and the second is timed: as in a loop that does nothing else, with the
    memory that the first one touched.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    start = time.perf_counter()
    for done in range(rounds):
        if done >= 3 and time.perf_counter() - start > seconds:
            break
        for name, step in steps.items():
            if again:
                step()
            times[name].append(timed(step))
    return times


def stolen() -> tuple[int, int]:
    """Ticks of the processors since the start that other machines of the host had, and all ticks; zeros where unknown.

    The former lengthen whatever is being timed.
    """
    try:
        _, *ticks = Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()
    except OSError:
        return 0, 0
    own = [int(one) for one in ticks[:8]]  # user, nice, system, idle, iowait, irq, softirq, steal
    return own[7], sum(own)


def timed(step: Callable[[], None]) -> float:
    if not torch.cuda.is_available():
        start = time.perf_counter()
        step()
        return time.perf_counter() - start
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    begin.record()
    step()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def summary(times: Iterable[float]) -> dict[str, float]:
    """Median, 20th and 80th percentile in milliseconds, and how many samples they come from."""
    values = sorted(1e3 * t for t in times)
    at = lambda share: values[round(share * (len(values) - 1))]  # noqa: E731
    return {"ms": statistics.median(values), "p20": at(0.2), "p80": at(0.8), "samples": len(values)}
