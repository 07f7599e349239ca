"""Rows of measurements as JSON and PNG.

    pytest --benchmark-only --benchmark-json=bench.json
    python -m bench.results bench.json bench/results/NAME      # writes NAME.json and NAME.png

A row: case, provider, ms (median), samples, tokens_per_s, percent_of_floor, extra_mib, dx_error; or why it is absent.
"""

import json
import sys
from pathlib import Path
from typing import Any

from opsd.environment import environment

Row = dict[str, Any]


def row(case: str, provider: str, tokens: int, timing: Row, floor_ms: float | None, **more: Any) -> Row:
    return {
        "case": case,
        "provider": provider,
        **timing,
        "tokens_per_s": tokens / timing["ms"] * 1e3,
        "percent_of_floor": 100 * floor_ms / timing["ms"] if floor_ms else None,
        **more,
    }


def from_pytest_benchmark(data: Row) -> list[Row]:
    """The rows of a file that --benchmark-json wrote."""
    found = [b for b in data["benchmarks"] if "case" in b["extra_info"]]
    floors = {b["extra_info"]["case"]: b for b in found if b["extra_info"]["provider"] == "floor"}
    rows = []
    for bench in found:
        info, stats = bench["extra_info"], bench["stats"]
        floor = floors.get(info["case"])
        timing = {"ms": 1e3 * stats["median"], "samples": stats["rounds"]}
        extra = info["extra_bytes"] / 2**20 if "extra_bytes" in info else None
        floor_ms = 1e3 * floor["stats"]["median"] if floor else None
        more = {"extra_mib": extra, "dx_error": info.get("error")}
        rows.append(row(info["case"], info["provider"], info["tokens"], timing, floor_ms, **more))
    return rows


def write(path: Path, contents: Row) -> str:
    """path.json and path.png; returns why there is no picture, or ""."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(contents, indent=1) + "\n", encoding="utf-8")
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "matplotlib is not installed"
    timed = [r for r in contents["rows"] if "ms" in r]
    cases = list(dict.fromkeys(r["case"] for r in timed))
    if not cases:
        return "nothing was timed"
    figure = Figure(figsize=(9, 1 + 1.9 * len(cases)), layout="constrained")
    for axis, case in zip(figure.subplots(len(cases), squeeze=False)[:, 0], cases, strict=True):
        rows = sorted((r for r in timed if r["case"] == case), key=lambda r: -r["ms"])
        colors = {"floor": "0.6", "native": "tab:red", "triton": "tab:red"}
        bars = axis.barh(
            [r["provider"] for r in rows],
            [r["ms"] for r in rows],
            color=[colors.get(r["provider"], "tab:blue") for r in rows],
        )
        axis.bar_label(bars, [f"{r['ms']:.4g}" for r in rows], padding=3, fontsize=8)
        axis.set_title(case, fontsize=9, loc="left")
        axis.margins(x=0.12)
        axis.set_xlabel("ms, forward and backward")
    figure.savefig(path.with_suffix(".png"), dpi=120)
    return ""


def main() -> None:
    if len(sys.argv) != 3:
        raise SystemExit("expected two arguments, a file of --benchmark-json and a path without suffix to write")
    source, target = map(Path, sys.argv[1:])
    data = json.loads(source.read_text(encoding="utf-8"))
    no_picture = write(target, {**environment(), "rows": from_pytest_benchmark(data)})
    print(f"wrote {target}.json" + (f"; no picture: {no_picture}" if no_picture else f" and {target}.png"))


if __name__ == "__main__":
    main()
