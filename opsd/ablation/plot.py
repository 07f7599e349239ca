"""The comparison as one picture: reward, format and length of the responses over steps, and accuracy with intervals."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from opsd.ablation.outcome import Outcome
from opsd.errors import writing
from opsd.page.charts import smooth

# Told apart by people who do not tell red from green (Okabe and Ito).
COLOURS: Final = {
    "base": "#999999",
    "sft": "#E69F00",
    "grpo": "#D55E00",
    "no-rationale": "#56B4E9",
    "label-only": "#009E73",
    "opsd": "#0072B2",
}
_CURVES: Final = {
    "reward": "reward of sampled responses",
    "format": "well-formed responses",
    "response_length": "response length (tokens)",
}


def draw(outcomes: Sequence[Outcome], path: Path) -> None:
    """Write the PNG. Curves are trailing means over a twentieth of the steps; SFT samples nothing and has none."""
    from matplotlib.figure import Figure  # no pyplot: no global state, no display

    figure = Figure(figsize=(11, 6.4), layout="constrained")
    axes = figure.subplots(2, 2).flatten()
    for axis, (name, title) in zip(axes, _CURVES.items(), strict=False):
        for outcome in outcomes:
            if outcome.samples:
                steps, values = outcome.curve(name)
                axis.plot(steps, smooth(values), color=COLOURS[outcome.arm.name], label=outcome.arm.title)
        axis.set(title=title, xlabel="step")
        axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        axis.grid(alpha=0.25)
    _bars(axes[3], outcomes)
    if axes[0].get_lines():
        axes[0].legend(fontsize=8)
    with writing(path):
        figure.savefig(path, dpi=130)


def _bars(axis: Any, outcomes: Sequence[Outcome]) -> None:
    found = [outcome.accuracy for outcome in outcomes]
    values = [one.accuracy for one in found]
    errors = [[one.accuracy - one.low for one in found], [one.high - one.accuracy for one in found]]
    titles = [outcome.arm.title.replace(", ", "\n") for outcome in outcomes]
    bars = axis.bar(titles, values, yerr=errors, color=[COLOURS[o.arm.name] for o in outcomes], capsize=3)
    axis.bar_label(bars, [f"{100 * value:.1f}" for value in values], label_type="center", color="white", fontsize=9)
    axis.set(title="accuracy on held-out rows, 95 % intervals", ylim=(0, 1))
    axis.tick_params(axis="x", labelsize=8)
