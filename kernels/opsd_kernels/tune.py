"""Measure launches of the row kernels on the CUDA device of this machine, and print rows for launch.py.

    python -m opsd_kernels.tune                                    # V = 151936, bf16 gradients, every divergence
    python -m opsd_kernels.tune --vocab 49152 --gradient float32 --divergence jsd --seconds 30
    python -m opsd_kernels.tune --offline 90 --divergence jsd      # no GPU: what each candidate takes, nothing timed

Kernel by kernel the fastest tile is kept, first at the splits of the table, then with each other number of splits: a
few dozen compilations instead of thousands. A launch that spills or does not fit the device counts as infinitely slow.
Nothing is chosen behind the user's back: a row counts once it is pasted into TABLE.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from opsd_kernels.divergence import KINDS, Divergence
from opsd_kernels.launch import Launch, Tile, Where, label, launch_for
from opsd_kernels.rows import RESULTS, RowOutputs

TILES = tuple(Tile(128 * warps * loads, warps, stages) for stages in (1, 3) for warps in (8, 4) for loads in (2, 4, 1))
SPLITS = (4, 8, 16, 32)
ROWS = 512  # of a chunk
SAMPLES = 7
DIVERGENCES = {
    label(kind, clips): Divergence(kind, clip=0.05 if clips else None) for kind in KINDS for clips in (False, True)
}

Change = dict[str, Any]  # fields of a Launch
Measure = Callable[[str, Launch], float]  # seconds of one kernel; infinite where the launch must not be used


@dataclass(frozen=True)
class Found:
    launch: Launch
    before: float  # seconds of all kernels of a chunk, at the launch of the table
    after: float
    tried: int
    complete: bool  # False: the time was spent before every candidate had its turn


def candidates(kernels: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Change]]:
    """Changes to the best launch so far, and the kernels that they concern."""
    for name in kernels:
        for tile in TILES:
            yield (name,), {name: tile}
    for splits in SPLITS:
        yield kernels, {"splits": splits}


def search(
    kernels: tuple[str, ...],
    start: Launch,
    measure: Measure,
    seconds: float,
    clock: Callable[[], float] = time.perf_counter,
) -> Found:
    """The fastest launch that is met within the time."""
    deadline = clock() + seconds
    best, times = start, {name: measure(name, start) for name in kernels}
    before, tried = sum(times.values()), 1
    for changed, change in candidates(kernels):
        launch = replace(best, **change)
        if launch == best:
            continue
        if clock() >= deadline:
            return Found(best, before, sum(times.values()), tried, complete=False)
        new = times | {name: measure(name, launch) for name in changed}
        tried += 1
        if sum(new.values()) < sum(times.values()):
            best, times = launch, new
    return Found(best, before, sum(times.values()), tried, complete=True)


def on_device(vocab: int, gradient: str, divergence: Divergence) -> Measure:
    """Seconds of a kernel on random rows, by CUDA events; the kernels before it run first, untimed."""
    from opsd_kernels.rows_triton import Passes

    g = torch.Generator("cuda").manual_seed(0)
    z_s = 3 * torch.randn(ROWS, vocab, generator=g, device="cuda")
    z_t = z_s + 0.1 * torch.randn(ROWS, vocab, generator=g, device="cuda")
    grad = torch.empty(ROWS, vocab, dtype=getattr(torch, gradient), device="cuda")
    scale = torch.ones(ROWS, dtype=torch.float32, device="cuda")
    out = RowOutputs(torch.empty(len(RESULTS), ROWS, dtype=torch.float32, device="cuda"))

    def measure(name: str, launch: Launch) -> float:
        passes = Passes(z_s, z_t, False, divergence, scale, grad, out, None, launch)
        try:
            for earlier in passes.names[: passes.names.index(name)]:
                passes.start(earlier)
            if passes.start(name).n_spills:
                return math.inf
        except Exception as error:  # out of shared memory or registers, a compiler that gives up: not this one
            print(f"{name} {launch}: {type(error).__name__}: {str(error).splitlines()[:1]}", file=sys.stderr)
            return math.inf
        return statistics.median(_timed(lambda: passes.start(name)) for _ in range(SAMPLES))

    return measure


def _timed(step: Callable[[], object]) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    step()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3


def tune(vocab: int, gradient: str, name: str, seconds: float) -> tuple[Where, Found]:
    """A row for the device of this machine, from the power of two below the vocabulary on."""
    from opsd_kernels.rows_triton import names

    major, minor = torch.cuda.get_device_capability()
    where = Where(10 * major + minor, bucket(vocab), gradient, name)
    start = launch_for(where.capability, vocab, gradient, name)
    divergence = DIVERGENCES[name]
    return where, search(names(divergence), start, on_device(vocab, gradient, divergence), seconds)


def bucket(vocab: int) -> int:
    return 1 << (vocab.bit_length() - 1)


def line(where: Where, found: Found) -> str:
    """A row of TABLE."""
    note = f"{1e3 * found.before:.3f} -> {1e3 * found.after:.3f} ms for {ROWS} rows, {found.tried} launches tried"
    return f"    {where}: {found.launch},  # {note}{'' if found.complete else ', out of time'}"


def offline(capability: int, vocab: int, gradient: str, name: str) -> Iterator[str]:
    """A line for every tile of every kernel: registers, spills, shared memory."""
    from opsd_kernels.offline import compile_for, resources
    from opsd_kernels.rows_triton import names

    start, divergence = launch_for(capability, vocab, gradient, name), DIVERGENCES[name]
    pointer = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}[gradient]
    for kernel in names(divergence):
        for tile in TILES:
            change: Change = {kernel: tile}
            launch = replace(start, **change)
            found = resources(compile_for(kernel, launch, divergence, capability, pointer))
            takes = f"{found.registers} registers, {found.shared} bytes shared"
            yield f"sm_{capability} {name} {kernel} {tile}: {found.obstacle(capability) or takes}"


def main() -> int:
    parser = argparse.ArgumentParser(description="Rows for opsd_kernels/launch.py, measured on this machine.")
    parser.add_argument("--vocab", type=int, default=151936)
    parser.add_argument(
        "--gradient", choices=["bfloat16", "float32"], default="bfloat16", help="dtype of gradient rows"
    )
    parser.add_argument("--divergence", nargs="+", choices=[*DIVERGENCES], default=[*DIVERGENCES])
    parser.add_argument("--seconds", type=float, default=60.0, help="for each divergence")
    parser.add_argument("--offline", type=int, metavar="CAPABILITY", help="compile for it and time nothing")
    args = parser.parse_args()
    if args.offline is not None:
        for name in args.divergence:
            for text in offline(args.offline, args.vocab, args.gradient, name):
                print(text, flush=True)
        return 0
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured (--offline needs none)", file=sys.stderr)
        return 2
    for name in args.divergence:
        print(line(*tune(args.vocab, args.gradient, name, args.seconds)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
