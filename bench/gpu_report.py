"""One command for a CUDA machine, at most eight minutes: exactness, no host sync, capture, speed, tuning, memory.

    PYTHONPATH=.:kernels python -m bench.gpu_report [bench/results/gpu]      # writes NAME.json and NAME.png

Needs torch and triton. Peers that are not installed are reported as absent. Each of SECTIONS has its own time, and what
goes wrong in one stays there (sections.py); NAME.json holds all rows so far at any moment. Without CUDA it says so and
exits with 2; a failed check, a failed section or a provider of ours that is wrong exits with 1.
"""

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from bench import accuracy, engine_report, gpu_checks, sections
from bench.cases import Case
from bench.gpu_sections import VOCAB, WIDTHS, N, ceilings, checks, forget, memory, speed, tuning
from bench.results import Row, write
from bench.sections import Section
from opsd.environment import environment

SECONDS = 440.0  # no section begins later or is given more; leaves the rest of the eight minutes for its last step
FAST = ("floor", "triton", "eager", "TRL", "Liger fused")
EVERYONE = (*FAST, "Liger chunked", "FLA", "torch.compile")


def _cases(width: int) -> list[Case]:
    """Trained with two heads, frozen with two, frozen with one."""
    forms = ((True, False), (False, False), (False, True))
    return [Case("head", N, VOCAB, width, "jsd", torch.bfloat16, trains, "cuda", one) for trains, one in forms]


def _kl(n: int, kind: str, width: int = 2048) -> Case:
    return Case("head", n, VOCAB, width, kind, torch.bfloat16, True, "cuda", False)


# In order of what is missed most when time runs out. A section is a name, seconds and a generator of rows; one more,
# of an engine say, is one more line here.
SECTIONS = [
    Section("correctness", 75, checks(lambda: gpu_checks.correctness("cuda"), lambda: gpu_checks.repetition("cuda"))),
    Section("host sync", 15, checks(gpu_checks.no_sync)),
    Section("capture", 15, checks(gpu_checks.capture)),
    Section("accuracy", 40, checks(accuracy.section)),
    Section("ceilings", 10, ceilings),
    *(Section(f"speed, D = {width}", 50, speed(*_cases(width), names=FAST)) for width in WIDTHS),
    Section("speed of the KLs", 30, speed(_kl(N, "reverse_kl"), _kl(N, "forward_kl"), _kl(1024, "jsd"), names=FAST)),
    Section("memory", 40, memory),
    Section("tuning", 90, tuning("jsd", "reverse_kl")),
    Section("engine", 60, engine_report.section),
    Section("speed of every peer", 60, speed(_kl(N, "forward_kl"), _kl(N, "jsd"), names=EVERYONE)),
]


def table(rows: list[Row]) -> list[str]:
    lines = []
    for case in dict.fromkeys(r["case"] for r in rows if "case" in r):
        lines += ["", case]
        for r in sorted((r for r in rows if r.get("case") == case), key=lambda r: r.get("ms", float("inf"))):
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


def say(row: Row) -> None:
    values = (f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items())
    print("  ".join(values), flush=True)


def healthy() -> bool:
    """Whether the device still answers; leaves nothing of a section behind."""
    forget()
    try:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.ones(8, device="cuda").sum().item() == 8)
    except Exception:  # an error that stays with the process, of whatever kind
        return False


def finish(target: Path) -> int:
    """The picture, the tables and what failed; returns the exit code."""
    path = target.with_suffix(".json")
    contents = sections.read(path)
    rows = [row for found in contents["sections"].values() for row in found["rows"]]
    contents["rows"] = [row for row in rows if "case" in row]
    contents["failures"] = sections.failures(contents)
    try:
        no_picture = write(target, contents)
    except Exception as error:  # the numbers are on disk already
        no_picture = f"{type(error).__name__}: {error}"
    sections.save(path, contents)
    print("\n".join([*table(contents["rows"]), "", *(f"FAILED {line}" for line in contents["failures"])]))
    print(f"wrote {path}" + (f"; no picture: {no_picture}" if no_picture else f" and {target}.png"))
    return 1 if contents["failures"] else 0


def main() -> int:
    arguments = [a for a in sys.argv[1:] if a != "--child"]
    target = Path(arguments[0] if arguments else "bench/results/gpu")
    path = target.with_suffix(".json")
    if len(arguments) < len(sys.argv) - 1:
        return sections.run(SECTIONS, path, healthy, say)
    if not torch.cuda.is_available():
        print("no CUDA device: nothing was measured", file=sys.stderr)
        return 2
    contents: Row = {**environment(), "deadline": time.time() + SECONDS, "sections": {}, "rows": []}
    say({"gpu": contents["gpu"], **contents["versions"]})
    sections.save(path, contents)

    def child() -> "subprocess.Popen[Any]":
        return subprocess.Popen([sys.executable, "-m", "bench.gpu_report", str(target), "--child"])

    sections.supervise(SECTIONS, path, child)
    return finish(target)


if __name__ == "__main__":
    sys.exit(main())
