"""One command for a CUDA machine, at most eight minutes: exactness, no host sync, capture, speed, memory.

    PYTHONPATH=.:kernels python -m bench.gpu_report [bench/results/gpu]      # writes NAME.json and NAME.png

Needs torch and triton. Peers that are not installed are reported as absent. Without CUDA it says so and exits with 2;
a failed check or a provider of ours that is wrong exits with 1.
"""

import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch

from bench import gpu_checks
from bench.cases import Case, gradient_error, operands, true_gradient
from bench.measure import interleaved, peak_extra_bytes, summary
from bench.providers import PROVIDERS, absent, max_error
from bench.results import Row, environment, row, write

SECONDS = 450.0  # leaves half a minute of the eight for the slowest step that is under way
ROUNDS = 25
SKIPPED = {"torch rows"}  # the fallback is no choice on a GPU


def cases(n: int, vocab: int) -> list[Case]:
    found = [
        Case("head", n, vocab, width, "jsd", torch.bfloat16, trainable, "cuda")
        for width in (2048, 4096, 1024)
        for trainable in (True, False)
    ]
    for kind in ("forward_kl", "reverse_kl"):
        found.append(Case("head", n, vocab, 2048, kind, torch.bfloat16, True, "cuda"))
    found.append(Case("head", 1024, vocab, 2048, "jsd", torch.bfloat16, True, "cuda"))
    return found


def measure(case: Case, seconds: float, names: Iterable[str]) -> list[Row]:
    """Rows of one case: who is absent, wrong or out of memory, and the timings of everyone else, interleaved."""
    rows: list[Row] = []
    steps: dict[str, Callable[[], None]] = {}
    facts: dict[str, Row] = {}
    for name in names:
        reason = absent(name, case)
        try:
            if not reason:
                step = PROVIDERS[name](case)
                step()
                error = None if name == "floor" else gradient_error(case)
                facts[name] = {"extra_mib": peak_extra_bytes(step, case.device) / 2**20, "dx_error": error}
                if error is not None and not error <= max_error(name, case.dtype):
                    reason = f"wrong: dX is off by {error:.1e}"
                else:
                    steps[name] = step
        except Exception as error:  # a peer may fail in any way; the report goes on without it
            reason = f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}"
        if reason:
            rows.append({"case": str(case), "provider": name, "absent": reason})
        if case.device == "cuda":
            torch.cuda.empty_cache()
    timings = {name: summary(times) for name, times in interleaved(steps, ROUNDS, seconds).items()}
    floor_ms = timings["floor"]["ms"] if "floor" in timings else None
    rows += [row(str(case), name, case.n, timing, floor_ms, **facts[name]) for name, timing in timings.items()]
    return rows


def forget() -> None:
    """The tensors of the case before."""
    operands.cache_clear()
    true_gradient.cache_clear()
    torch._dynamo.reset()


def table(rows: list[Row]) -> list[str]:
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows):
        lines += ["", case]
        for r in sorted((r for r in rows if r["case"] == case), key=lambda r: r.get("ms", float("inf"))):
            if "absent" in r:
                lines.append(f"  {r['provider']:>14}  absent: {r['absent']}")
                continue
            share = f"{r['percent_of_floor']:.0f} % of floor" if r["percent_of_floor"] else ""
            error = f"dX {r['dx_error']:.1e}" if r["dx_error"] is not None else ""
            lines.append(
                f"  {r['provider']:>14} {r['ms']:9.2f} ms ({r['p20']:.2f}-{r['p80']:.2f}, {r['samples']} samples)"
                f" {r['tokens_per_s'] / 1e3:8.1f} ktok/s  {share:>14}  {r['extra_mib']:7.0f} MiB  {error}"
            )
    return lines


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    start = time.perf_counter()
    target = Path(sys.argv[1] if len(sys.argv) > 1 else "bench/results/gpu")
    contents: Row = {**environment(), "checks": [], "rows": []}
    print(f"{contents['gpu']}, {contents['versions']}")

    def peak(case: Case) -> int:
        step = PROVIDERS["triton"](case)
        step()
        return peak_extra_bytes(step, "cuda")

    for check in (
        lambda: gpu_checks.correctness("cuda"),
        lambda: gpu_checks.repetition("cuda"),
        gpu_checks.no_sync,
        gpu_checks.capture,
        lambda: gpu_checks.flat_memory(peak),
    ):
        rows = check()
        contents["checks"] += rows
        for r in rows:
            print(" ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in r.items()), flush=True)
    forget()
    planned = cases(n=8192, vocab=151936)
    for i, case in enumerate(planned):
        left = SECONDS - (time.perf_counter() - start)
        if left < 10:
            contents["rows"].append({"case": str(case), "provider": "all", "absent": "no time left"})
            continue
        names = [name for name in PROVIDERS if name not in SKIPPED]
        rows = measure(case, 0.5 * left / (len(planned) - i), names)
        contents["rows"] += rows
        print("\n".join(table(rows)), flush=True)
        write(target, contents)  # what is known so far survives an interruption
        forget()
    contents["seconds"] = time.perf_counter() - start
    no_picture = write(target, contents)
    print(f"\nwrote {target}.json" + (f"; no picture: {no_picture}" if no_picture else f" and {target}.png"))
    wrong = [r for r in contents["rows"] if r["provider"] == "triton" and "absent" in r]
    return 1 if wrong or not all(r["ok"] for r in contents["checks"]) else 0


if __name__ == "__main__":
    sys.exit(main())
