"""The page itself: one HTML file that asks nobody for anything. The template escapes every text; see page.html.j2.

Beside that, the page's own policy lets nothing run but its one script, known by its hash, and nothing be fetched.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from opsd.config import Config
from opsd.data import Example
from opsd.log import RunDir
from opsd.page.charts import HEIGHT, WIDTH, Chart, charts
from opsd.page.media import WAVE_COLUMNS, WAVE_HEIGHT, film, picture, sound
from opsd.page.replay import Answer, Replayed, Side, Token

HERE = Path(__file__).parent
TEACHERS = {
    "ema": "a moving average of the student",
    "frozen": "the starting model",
    "live": "the student itself",
}


@dataclass(frozen=True)
class Part:
    kind: str  # text, image, video, audio
    value: Any  # str, Picture, times and Pictures, Sound


@dataclass(frozen=True)
class Clip:
    """One row as a person sees it, and both answers."""

    row: Example
    turns: list[tuple[str, list[Part]]]  # role and parts
    hint: list[Part]  # what only the teacher sees
    answers: list[tuple[str, Answer]]  # when, and what was answered


class Scale(NamedTuple):
    """From a divergence to the strength of its colour: sqrt(d / largest), so that small ones can be told apart."""

    largest: float

    def strength(self, divergence: float | None) -> float:
        return 0.0 if divergence is None else min(1.0, math.sqrt(max(divergence, 0.0) / self.largest))

    def ticks(self) -> list[tuple[float, float]]:
        """(strength, divergence) along the legend."""
        return [(share, share * share * self.largest) for share in (0.0, 0.25, 0.5, 0.75, 1.0)]


def render(
    directory: RunDir, config: Config, table: list[tuple[str, dict[str, Any]]], replayed: list[Replayed], about: str
) -> str:
    """The page as text. table: rows of the accuracy table; about: which clips these are, in a sentence."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE, encoding="utf-8"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.policies["json.dumps_kwargs"] = {"allow_nan": False, "separators": (",", ":")}
    environment.filters["g"] = lambda value: f"{value:.4g}" if abs(value) < 1000 else f"{value:.0f}"
    clips = [_clip(one, config) for one in replayed]
    drawn = charts(directory.read("metrics"), directory.read("evaluations"), config.rewards)
    answers = [answer for clip in clips for _, answer in clip.answers]
    script = (HERE / "page.js").read_text(encoding="utf-8")
    return environment.get_template("page.html.j2").render(
        name=directory.path.absolute().name,
        config=config,
        settings=(directory.path / "config.yaml").read_text(encoding="utf-8"),
        divergence=_divergence_name(config),
        teacher=TEACHERS[config.teacher.kind if config.objective.kind == "distill" else "live"],
        table=table,
        charts=drawn,
        clips=clips,
        about=about,
        scale=_scale(answers),
        style=(HERE / "page.css").read_text(encoding="utf-8"),
        script=script,
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        data={"charts": [_points(chart) for chart in drawn], "answers": [_numbers(answer) for answer in answers]},
        size={"width": WIDTH, "height": HEIGHT, "columns": WAVE_COLUMNS, "wave": WAVE_HEIGHT},
    )


def _clip(one: Replayed, config: Config) -> Clip:
    row, privilege = one.row, config.prompts.privilege
    hint = [Part("text", text)] if privilege != "none" and (text := getattr(row, privilege)) else []
    if hint and privilege == "rationale":
        hint = [*(_part(part, config) for part in row.teacher_media), *hint]
    turns = [(message["role"], [_part(part, config) for part in message["content"]]) for message in row.messages]
    return Clip(row, turns, hint, [("before", one.before), ("after", one.after)])


def _part(part: dict[str, Any], config: Config) -> Part:
    kind = part["type"]
    shown = {"image": picture, "video": lambda path: film(path, config.media.frames), "audio": sound}
    return Part(kind, shown[kind](part[kind]) if kind in shown else part[kind])


def _divergence_name(config: Config) -> str:
    objective = config.objective
    if objective.divergence == "jsd":
        return f"Jensen-Shannon divergence, β = {objective.beta:g}"
    return {"reverse_kl": "reverse KL", "forward_kl": "forward KL"}[objective.divergence]


def _scale(answers: Iterable[Answer]) -> Scale:
    known = [t.divergence for answer in answers for t in answer.tokens if t.divergence is not None]
    return Scale(max([1e-6, *known]))


def _points(chart: Chart) -> dict[str, Any]:
    """What page.js needs to read values off a chart: steps, values, and where both are drawn."""
    return {
        "series": [
            {
                "name": one.name,
                "step": one.x,
                "value": [_short(y) for y in one.y],
                "x": [round(chart.across(x), 1) for x in one.x],
                "y": [round(chart.down(y), 1) for y in one.y],
            }
            for one in chart.series
        ]
    }


def _numbers(answer: Answer) -> list[dict[str, Any]]:
    """What page.js shows of each token."""
    return [_of_token(token) for token in answer.tokens]


def _of_token(token: Token) -> dict[str, Any]:
    return {"d": _short(token.divergence), "student": _of_side(token.student), "teacher": _of_side(token.teacher)}


def _of_side(side: Side | None) -> dict[str, Any] | None:
    if side is None:
        return None
    top = [[c.text, _short(c.probability), int(c.written)] for c in side.top]
    return {"p": _short(side.probability), "h": _short(side.entropy), "top": top}


def _short(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")
