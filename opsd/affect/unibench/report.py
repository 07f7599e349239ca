"""The table of a run: our row beside the published ones, as text, Markdown and JSON; the scores of every clip."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from opsd.affect.unibench.datasets import DATASETS
from opsd.affect.unibench.metrics import interval
from opsd.affect.unibench.published import PUBLISHED
from opsd.affect.unibench.score import Score
from opsd.errors import writing


def summary(name: str, scores: Sequence[Score], sources: Mapping[str, str]) -> dict[str, Any]:
    """Everything in one record; scores in percent, the mean unweighted over the datasets that were scored."""
    low, high = interval(np.mean([score.replicates for score in scores], axis=0))
    return {
        "name": name,
        "mean": 100 * float(np.mean([score.value for score in scores])),
        "mean_low": 100 * low,
        "mean_high": 100 * high,
        "datasets": {score.dataset.name: _record(score, sources[score.dataset.name]) for score in scores},
        "replicates": len(scores[0].replicates),
    }


def _record(score: Score, source: str) -> dict[str, Any]:
    low, high = score.interval
    return {
        "metric": score.dataset.metric,
        "score": 100 * score.value,
        "low": 100 * low,
        "high": 100 * high,
        **{name: 100 * value for name, value in score.more.items()},
        "clips": len(score.samples),
        "official_clips": score.dataset.clips,
        "labels": source,
    }


def table(record: Mapping[str, Any]) -> list[list[str]]:
    """Header, our row, its intervals, and the published rows; a number that was not published is left empty, and a mean
    over all nine datasets is not shown beside one over fewer."""
    names = list(record["datasets"])
    entries = list(record["datasets"].values())
    rows = [
        ["", *(f"{DATASETS[name].title} ({DATASETS[name].metric})" for name in names), "mean"],
        [record["name"], *(f"{entry['score']:.2f}" for entry in entries), f"{record['mean']:.2f}"],
        [
            "95 % interval",
            *(f"{entry['low']:.2f} - {entry['high']:.2f}" for entry in entries),
            f"{record['mean_low']:.2f} - {record['mean_high']:.2f}",
        ],
    ]
    columns = [*names, "mean" if len(names) == len(DATASETS) else ""]
    for model, scores in PUBLISHED.items():
        cells = [f"{scores[name]:.2f}" if name in scores else "" for name in columns]
        rows += [[model, *cells]] if any(cells) else []
    return rows


def markdown(record: Mapping[str, Any]) -> str:
    """The table and its notes."""
    header, *rows = ([*map(str, row)] for row in table(record))
    lines = [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]
    return "\n".join([*lines, "", *(f"- {note}" for note in _notes(record))]) + "\n"


def _notes(record: Mapping[str, Any]) -> list[str]:
    notes = [f"Percent; intervals from {record['replicates']} bootstrap replicates over clips."]
    sources = sorted({entry["labels"] for entry in record["datasets"].values()})
    notes.append(f"Labels extracted by: {'; '.join(sources)}. The official script has a Qwen2.5-7B-Instruct do it.")
    for name, entry in record["datasets"].items():
        if entry["clips"] != entry["official_clips"]:
            notes.append(
                f"{DATASETS[name].title}: {entry['clips']} clips, the benchmark has {entry['official_clips']}: "
                "not comparable."
            )
    mscores = [
        f"{DATASETS[name].title} {entry['m-score']:.2f}"
        for name, entry in record["datasets"].items()
        if "m-score" in entry
    ]
    if mscores:
        notes.append(f"m-score (HIT over the answers inside the label groups): {', '.join(mscores)}.")
    return notes


def show(record: Mapping[str, Any]) -> None:
    """The table and its notes in the terminal."""
    from rich.console import Console
    from rich.table import Column, Table

    header, *rows = table(record)
    drawn = Table(Column(header[0], no_wrap=True), *header[1:], title="MER-UniBench")
    for row in rows:
        drawn.add_row(*row)
    Console(width=max(100, 14 * len(header))).print(drawn)
    print("\n".join(_notes(record)))


def write(out: Path, record: Mapping[str, Any], scores: Sequence[Score]) -> None:
    """OUT/report.json, OUT/report.md and OUT/samples.jsonl, one line per clip."""
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        (out / "report.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        (out / "report.md").write_text(markdown(record), encoding="utf-8")
        samples = [sample for score in scores for sample in score.samples]
        lines = [json.dumps(sample, ensure_ascii=False) + "\n" for sample in samples]
        (out / "samples.jsonl").write_text("".join(lines), encoding="utf-8")
