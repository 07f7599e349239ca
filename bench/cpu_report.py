"""`python -m bench.cpu_report --out NAME.json`: the targets of a CPU, whole shapes, providers timed in turn.

A shared machine drifts by tens of percent within a minute, so every round times each provider once, and what is
reported is the median over rounds of a provider's time divided by the floor's of the same round. Each runs twice in its
turn, and the second is timed: the first touches the memory that a loop of its own would find touched. `stolen` is the
share of the processors that other machines of the host had meanwhile; with more than a few percent a row is not worth
much. Cases that the file has from a run before stay in it unless they are measured again: the whole can be done in
parts.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

from bench.cases import FULL_CASES, Case, gradient_error
from bench.measure import interleaved, peak_extra_bytes, stolen
from bench.providers import PROVIDERS, absent, max_error
from opsd.environment import environment

TIMED = ("native", "torch.compile", "Liger chunked")


def measure(case: Case, names: tuple[str, ...], rounds: int, seconds: float) -> list[dict[str, Any]]:
    """One row per provider, the floor first; a provider whose gradient is wrong is not timed."""
    steps, facts = {"floor": PROVIDERS["floor"](case)}, {"floor": {}}
    steps["floor"]()
    for name in names:
        if reason := absent(name, case):
            facts[name] = {"absent": reason}
            continue
        step = PROVIDERS[name](case)
        step()
        error = gradient_error(case)
        if error > max_error(name, case):
            facts[name] = {"absent": f"dX is off by {error:.1e}"}
            continue
        facts[name] = {"error": error, "extra_mib": peak_extra_bytes(step, case.device) / 2**20}
        steps[name] = step
    before = stolen()
    times = interleaved(steps, rounds, seconds, again=True)
    refused, ticks = (b - a for a, b in zip(before, stolen(), strict=True))
    rows = []
    for name, known in facts.items():
        row: dict[str, Any] = {"case": str(case), "provider": name, **known}
        if name in times:
            ratios = [one / base for one, base in zip(times[name], times["floor"], strict=True)]
            row |= {
                "ms": 1e3 * statistics.median(times[name]),
                "best_ms": 1e3 * min(times[name]),
                "of_floor": statistics.median(ratios),
                "of_best_floor": min(times[name]) / min(times["floor"]),
                "rounds": len(ratios),
                "stolen": refused / max(ticks, 1),
            }
        rows.append(row)
    return rows


def line(row: dict[str, Any]) -> str:
    if "ms" not in row:
        return f"  {row['provider']:14s} {row['absent']}"
    extra = f"  {row['extra_mib']:7.0f} MiB  dX error {row['error']:.1e}" if "error" in row else ""
    return (
        f"  {row['provider']:14s} {row['ms']:8.0f} ms  {row['of_floor']:5.2f} x floor  "
        f"(best of both {row['of_best_floor']:.2f}, stolen {row['stolen']:.0%}){extra}"
    )


def merged(old: list[dict[str, Any]], new: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows in the order of FULL_CASES; of a case that was measured anew only the new ones, which share its floor."""
    order, taken = [str(case) for case in FULL_CASES], {row["case"] for row in new}
    kept = [row for row in old if row["case"] in order and row["case"] not in taken]
    return sorted(kept + new, key=lambda row: order.index(row["case"]))


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m bench.cpu_report", description=__doc__)
    made.add_argument("--out", type=Path, help="JSON; written after every case")
    made.add_argument("--only", default="", help="cases whose name contains this, such as 'S1' or 'jsd float32'")
    made.add_argument("--providers", nargs="*", default=list(TIMED), choices=list(PROVIDERS))
    made.add_argument("--rounds", type=int, default=7)
    made.add_argument("--seconds", type=float, default=40.0, help="a case stops after so many, with 3 rounds at least")
    args = made.parse_args()
    rows: list[dict[str, Any]] = []
    if args.out is not None and args.out.exists():
        rows = json.loads(args.out.read_text(encoding="utf-8"))["rows"]
    about = environment()
    for case in FULL_CASES:
        if args.only not in str(case):
            continue
        print(case, flush=True)
        found = measure(case, tuple(args.providers), args.rounds, args.seconds)
        print("\n".join(map(line, found)), flush=True)
        rows = merged(rows, [{**row, "commit": about["commit"]} for row in found])
        if args.out is not None:
            args.out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
