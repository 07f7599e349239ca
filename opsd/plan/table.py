"""A plan as a table: a line for what takes memory, a column for each phase, and the keys that move the line."""

from __future__ import annotations

from opsd.plan.names import KNOBS, ON_HOST, on_device
from opsd.plan.plan import MARGIN, Plan, room

_ORDER = ("rollout", "teacher", "student", "update", "evaluation")
_MIB = 1 << 20


def rendered(plan: Plan) -> str:
    """MiB, the largest line of the fullest phase first; what it comes to, whether it fits, and what would."""
    phases = [name for name in _ORDER if name in plan.phases]
    fullest = max(phases, key=lambda name: on_device(plan.phases[name]))
    lines = [name for name in KNOBS if any(plan.phases[phase][name] for phase in phases)]
    lines.sort(key=lambda name: -plan.phases[fullest][name])

    def row(name: str) -> list[str]:
        return [name, *(_mib(plan.phases[phase][name]) for phase in phases), KNOBS[name]]

    rows = [["MiB", *phases, "moved by"], *(row(name) for name in lines if name not in ON_HOST)]
    rows.append(["all", *(_mib(on_device(plan.phases[phase])) for phase in phases), ""])
    rows += [row(name) for name in lines if name in ON_HOST]
    widths = [max(len(row[i]) for row in rows) for i in range(len(phases) + 1)]
    table = ["  ".join([_cell(row[i], widths[i], i) for i in range(len(widths))] + [row[-1]]).rstrip() for row in rows]
    return "\n".join([*table, "", *verdict(plan, fullest)])


def verdict(plan: Plan, fullest: str) -> list[str]:
    """Whether the plan fits, and the largest budget that does."""
    have, may = plan.memory / _MIB, room(plan.memory) / _MIB
    short = plan.peak / _MIB - may
    lines = [
        f"peak {plan.peak / _MIB:,.0f} MiB ({fullest}) of {may:,.0f} MiB, which is {have:,.0f} less {MARGIN:.0%} for"
        " what no plan sees: " + ("fits" if plan.fits else f"does not fit, {short:,.0f} MiB too much")
    ]
    if plan.largest is None:
        lines.append("no engine.token_budget fits: not even one response with its prompt does")
    elif plan.largest >= plan.whole:
        lines.append(f"largest engine.token_budget that fits: {plan.whole}, the whole step in one pass")
    else:  # a budget that fits may be above the largest pass it makes
        largest = max(plan.largest, plan.budget) if plan.fits else plan.largest
        lines.append(f"largest engine.token_budget that fits: {largest}")
    return lines


def _mib(size: int) -> str:
    return f"{size / _MIB:,.0f}" if size >= 10 * _MIB else f"{size / _MIB:.2f}" if size else "-"


def _cell(text: str, width: int, column: int) -> str:
    return text.ljust(width) if column == 0 else text.rjust(width)
