"""The comparison as Markdown, from the record that is also its JSON."""

from __future__ import annotations

from typing import Any

from opsd.ablation.arms import ARMS
from opsd.ablation.outcome import REFERENCES

Record = dict[str, Any]


def markdown(record: Record, picture: str) -> str:
    """Heading, table, what the columns and the budget are, and the picture beside it."""
    arms = record["arms"]
    references = [name for name in REFERENCES if name in arms]
    against = [f"against {ARMS[name].title}" for name in references]
    header = ["arm", "learns from", "accuracy", "macro-F1", *against, "format", "settings"]
    rows = [_row(name, arm, references) for name, arm in arms.items()]
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    notes = [f"- {note}" for note in _notes(record)]
    return "\n".join(["# Ablation", "", *lines, "", *notes, "", f"![the arms compared]({picture})"]) + "\n"


def _row(name: str, arm: Record, references: list[str]) -> list[str]:
    accuracy, f1 = arm["accuracy"], arm["macro_f1"]
    return [
        arm["title"],
        arm["learns_from"],
        _value(accuracy["accuracy"], accuracy, bold=name == "opsd"),
        _value(f1["value"], f1),
        *(_difference(arm.get(f"minus_{other}")) for other in references),
        f"{100 * arm['format']:.1f}",
        _settings(arm),
    ]


def _settings(arm: Record) -> str:
    """The learning rate and alpha, which tables of methods name, and what else the arm has of its own."""
    if arm["lr"] is None:
        return "-"
    named = [f"lr {arm['lr']:g}"] + ([f"alpha {arm['alpha']:g}"] if arm["alpha"] else [])
    others = [f"`{word}`" for word in arm["settings"] if not word.startswith(("optim.lr=", "objective.alpha="))]
    return ", ".join([*named, *others])


def _value(value: float, interval: Record, bold: bool = False) -> str:
    text = f"{100 * value:.1f}"
    text = f"**{text}**" if bold else text
    return f"{text} [{100 * interval['low']:.1f}, {100 * interval['high']:.1f}]"


def _difference(interval: Record | None) -> str:
    if interval is None:
        return "-"
    value, low, high = (100 * interval[key] + 0.0 for key in ("value", "low", "high"))
    return f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"


def _notes(record: Record) -> list[str]:
    b, arms = record["budget"], record["arms"]
    seconds = "; ".join(f"{arm['title']} {arm['training_seconds']:.0f}" for arm in arms.values() if arm["updates"])
    notes = [
        f"Percent of {b['held_out_rows']} held-out rows ({b['held_out_split']}), greedy answers, no rationale for the "
        "student. 95 % intervals: Wilson's for accuracy, percentiles of the bootstrap over rows for macro-F1 and for "
        "differences, which are paired. Format is the share of these answers that are well formed.",
        f"Same budget: the same rows in the same order, {b['steps']} steps of {b['prompts_per_step']} prompts, seed "
        f"{b['seed']}. Arms that sample draw {b['responses_per_prompt']} responses to a prompt; SFT takes the row's "
        "own answer instead: fewer tokens, but gold. A step is one update, unless a setting says otherwise.",
    ]
    notes += [f"Seconds of training: {seconds}."] if seconds else []
    teachers = [
        f"{arm['title']} {_value(arm['teacher']['accuracy'], arm['teacher'])}"
        for arm in arms.values()
        if arm["teacher"] is not None and arm["teacher"]["privilege"] != "none"
    ]
    notes += [f"What the teacher answers itself, at the end: {'; '.join(teachers)}."] if teachers else []
    return notes
