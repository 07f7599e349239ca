"""From a response to its labels, without a second model: the answer block, then a lexicon over the wheel words."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Final, Protocol

from opsd.affect.unibench.labels import parse_labels
from opsd.affect.unibench.polarity import sentiment
from opsd.affect.unibench.wheels import Wheels
from opsd.rewards import parse_answer

_WORD: Final = re.compile(r"\w+(?:[-'\u2019]\w+)*")
_CLAUSE: Final = re.compile(r"[.,;:!?()\[\]\"\n]+")
_NEGATORS: Final = {"not", "no", "never", "without", "neither", "nor", "hardly", "cannot", "lacks", "lacking"}
_SENTIMENTS: Final = ("positive", "negative", "neutral")


class Extractor(Protocol):
    """What turns responses into labels, and labels into sentiments, both as text, as the official files have it."""

    name: str

    def openset(self, responses: Mapping[str, str]) -> dict[str, str]:
        """Clip -> "[happy, surprised]"."""
        ...

    def sentiment(self, openset: Mapping[str, Any]) -> dict[str, str]:
        """Clip -> "positive", "negative" or "neutral"."""
        ...


class Lexicon:
    """Labels are the surface forms of the wheels that occur in the first non-empty answer block, or, without one, in
    the whole response; the longest form wins, order is that of the text, and a form that is negated does not count.

    The official tables have everyday words ("clear", "close"), so free text without an answer block gets labels that a
    second model would not give.
    """

    name = "lexicon"

    def __init__(self, wheels: Wheels) -> None:
        self.wheels = wheels
        surfaces = [surface for surface in wheels.routes if any(wheels.of(surface))]
        self._forms: dict[str, list[tuple[list[str], str]]] = {}
        for surface in {*surfaces, *_SENTIMENTS}:
            tokens = _WORD.findall(surface.lower())
            if tokens:
                self._forms.setdefault(tokens[0], []).append((tokens, surface))
        for forms in self._forms.values():
            forms.sort(key=lambda form: (-len(form[0]), form[1]))

    def openset(self, responses: Mapping[str, str]) -> dict[str, str]:
        return {name: f"[{', '.join(self.labels(text))}]" for name, text in responses.items()}

    def sentiment(self, openset: Mapping[str, Any]) -> dict[str, str]:
        return {name: sentiment(parse_labels(labels), self.wheels) for name, labels in openset.items()}

    def labels(self, response: str) -> list[str]:
        """The labels of one response, each once."""
        text = parse_answer(response) or response.lower()
        return list(dict.fromkeys(label for clause in _CLAUSE.split(text) for label in self._in(clause)))

    def _in(self, clause: str) -> Iterator[str]:
        tokens = _WORD.findall(clause)
        at = 0
        while at < len(tokens):
            found = next(
                (form for form in self._forms.get(tokens[at], ()) if tokens[at:][: len(form[0])] == form[0]), None
            )
            if found is None:
                at += 1
                continue
            if not any(_negates(token) for token in tokens[max(0, at - 2) : at]):
                yield found[1]
            at += len(found[0])


def _negates(token: str) -> bool:
    """Among the two words before a label: "not happy", "isn't very happy"."""
    return token in _NEGATORS or token.endswith(("n't", "n\u2019t"))
