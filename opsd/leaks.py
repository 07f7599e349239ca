"""Texts that speak of what they must not know: `python -m opsd.leaks FILE.jsonl`.

A rationale leaks when it states the label or speaks of having been given it: the teacher then repeats instead of
perceiving, and the student learns to say "as given" of evidence that it never sees (EDGE-OPD, arXiv 2605.23493). A
student's answer leaks when it speaks of evidence, a rationale or an observer, which only the teacher's view has.

The patterns are conservative. Words inside double quotes are not searched, they are somebody else's, and a rationale
that only names an emotion ("a sad smile") does not leak; how many name their label is reported apart.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from opsd.cli import guard
from opsd.errors import InputError

_GIVEN: Final = r"(?:given|provided|supplied)"
_SECRET: Final = r"(?:evidence|rationale|label|annotation|hint|privileged (?:context|information))"
# What either kind of text may not say. name -> pattern, searched without regard to case.
ANY: Final = {
    "as given": r"\bas (?:was |were |is |already )?(?:given|provided|annotated|labell?ed)\b"
    r"(?! (?:to|away|up|off|that|name|on the (?:bottle|box|package|packet|product)))",
    "given evidence": rf"\b(?:the|this|your) {_GIVEN} {_SECRET}\b"
    rf"|\b(?:the|this|your) {_SECRET} (?:that (?:is|was) |which (?:is|was) )?{_GIVEN}\b"
    rf"|\b(?:I|we) (?:was|were|am|are|have been) (?:given|told|provided with) (?:the|a|an|this|that the) {_SECRET}\b",
    "according to": rf"\b(?:according to|based on|consistent with|in line with|per) (?:the|this|your) {_SECRET}\b",
    "ground truth": r"\bground[- ]truth\b|\bgold(?:en)? (?:label|answer|annotation)\b",
    "correct answer": r"\bthe (?:correct|right|true|expected|target|reference) (?:answer|label)\b",
    "annotator": r"\bthe annotators?\b",
    "标签": r"标签|标准答案|(?:根据|基于|如)所?(?:提供|给出|给定)的?(?:证据|信息|线索|答案)",
}
RATIONALE: Final = ANY | {
    "the label": r"\b(?:the|this|its|assigned|emotion) label\b(?! (?:on|of) (?:the|a|his|her|their) )|\blabell?ed as\b",
    "answer block": r"</?answer>",
}
ANSWER: Final = ANY | {
    "the evidence": r"\b(?:the|this) evidence\b(?! (?:of|in|from|on) (?:his|her|their|a|tears)\b)",
    "the rationale": r"\b(?:the|this) rationale\b(?! (?:for|behind|of)\b)",
    "the observer": r"\bthe observer\b|\b(?:observer's|observers') (?:notes?|evidence|description)\b",
    "the label": r"\bthe label\b(?! (?:on|of) (?:the|a|his|her|their) )",
}
# {label} is the row's own.
STATED: Final = (
    r"\b(?:label|answer|emotion|emotional state|sentiment)(?: is| was| ?[:=]) ?(?:clearly |therefore |thus )?{label}\b"
    r"|\b(?:classified|categori[sz]ed|annotated) as {label}\b"
)
_QUOTED: Final = re.compile(r'"[^"\n]*"|“[^”\n]*”|「[^」\n]*」|«[^»\n]*»')


def _compile(patterns: dict[str, str]) -> dict[str, re.Pattern[str]]:
    return {name: re.compile(pattern, re.IGNORECASE) for name, pattern in patterns.items()}


_RATIONALE, _ANSWER = _compile(RATIONALE), _compile(ANSWER)


@dataclass(frozen=True)
class Leak:
    """What a text said that it may not know: the pattern's name, and the words."""

    name: str
    words: str


def rationale_leaks(text: str, label: str | None = None) -> list[Leak]:
    """What gives the label away, or speaks of having been given it; [] for a clean rationale."""
    found = _search(_RATIONALE, text)
    if label and (hit := re.search(STATED.replace("{label}", re.escape(label)), _unquoted(text), re.IGNORECASE)):
        found.append(Leak("states the label", hit.group()))
    return found


def answer_leaks(text: str) -> list[Leak]:
    """What of a student's answer speaks of the teacher's view; [] for a clean one."""
    return _search(_ANSWER, text)


def names_label(text: str, label: str) -> bool:
    """Whether the label stands in the text as a word, in any sense."""
    return re.search(rf"(?<!\w){re.escape(label)}(?!\w)", text, re.IGNORECASE) is not None


def _search(patterns: dict[str, re.Pattern[str]], text: str) -> list[Leak]:
    text = _unquoted(text)
    return [Leak(name, hit.group()) for name, pattern in patterns.items() if (hit := pattern.search(text))]


def _unquoted(text: str) -> str:
    return _QUOTED.sub('""', text)


@dataclass(frozen=True)
class Text:
    """A rationale or an answer of a file."""

    kind: str  # "rationale" or "answer"
    id: str
    line: int
    text: str
    label: str | None

    def leaks(self) -> list[Leak]:
        return rationale_leaks(self.text, self.label) if self.kind == "rationale" else answer_leaks(self.text)


def read_texts(path: Path) -> Iterator[Text]:
    """The rationales of rows, the responses of samples and predictions, and the answers rows are trained on."""
    with path.open("rb") as file:
        for line, raw in enumerate(file, start=1):
            if not raw.strip():
                continue
            try:
                row = json.loads(raw.decode("utf-8-sig"))
            except ValueError as error:
                raise InputError("one JSON object on the line", str(error), file=path, line=line) from error
            if not isinstance(row, dict):
                raise InputError("one JSON object on the line", type(row).__name__, file=path, line=line)
            # a prediction's "answer" is only what was parsed from its response
            answer = "response" if "response" in row else "answer"
            for kind, field in (("rationale", "rationale"), ("rationale", "privileged_context"), ("answer", answer)):
                if isinstance(row.get(field), str) and row[field]:
                    yield Text(kind, str(row.get("id", line)), line, row[field], _label(row))


def _label(row: dict[str, Any]) -> str | None:
    return row["label"] if isinstance(row.get("label"), str) else None


def run(args: argparse.Namespace) -> None:
    try:
        texts = list(read_texts(args.file))
    except OSError as error:
        raise InputError("a readable JSONL file", error.strerror or str(error), file=args.file) from error
    if not texts:
        raise InputError("rationale, response or answer in its lines", "none of them", file=args.file)
    for kind in ("rationale", "answer"):
        for line in report([text for text in texts if text.kind == kind], args.examples):
            print(line)


def report(texts: Sequence[Text], examples: int) -> Iterator[str]:
    """Lines about the texts of one kind: how many leak, of which pattern, and the first `examples` that do."""
    if not texts:
        return
    leaking = [(text, leaks) for text in texts if (leaks := text.leaks())]
    yield f"{len(leaking)} of {len(texts)} {texts[0].kind}s leak ({len(leaking) / len(texts):.1%})"
    if texts[0].kind == "rationale":
        named = sum(text.label is not None and names_label(text.text, text.label) for text in texts)
        yield f"  {named} name their label in some sense, which is no leak by itself"
    for name, count in Counter(leak.name for _, leaks in leaking for leak in leaks).most_common():
        yield f"  {name}: {count}"
    for text, leaks in leaking[:examples]:
        yield f"  line {text.line}, {text.id}: " + ", ".join(repr(leak.words) for leak in leaks)


def main(argv: Sequence[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m opsd.leaks",
        description="Rationales that give their label away, and answers that speak of what only the teacher sees.",
        allow_abbrev=False,
    )
    made.add_argument("file", type=Path, help="rows, a run's samples.jsonl, or predictions (JSONL)")
    made.add_argument("--examples", type=int, default=10, help="how many to show of each kind")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return guard(run, made, argv)


if __name__ == "__main__":
    sys.exit(main())
