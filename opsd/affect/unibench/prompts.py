"""The official extraction prompts, read from the user's copy of the benchmark's code, and what follows a reply.

`toolkit/utils/qwen.py` of zeroQiaoba/AffectGPT builds each prompt in a nested function `func_prompt_template` as an
f-string around `reason`. The file is parsed, never run.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from opsd.errors import InputError

_TEMPLATE: Final = "func_prompt_template"
_SLOT: Final = "reason"
# Once each and in this order, as the official post-processing cuts them.
_WIDE_COLON: Final = "\uff1a"
_LEAD_INS: Final = ("输入", "输出", "翻译", f"让我们来翻译一下{_WIDE_COLON}", "output", "Output", "input", "Input")


@dataclass(frozen=True)
class Template:
    """A prompt with one slot."""

    before: str
    after: str

    def fill(self, text: str) -> str:
        return f"{self.before}{text}{self.after}"


@dataclass(frozen=True)
class ExtractionPrompts:
    openset: Template  # a response -> its labels
    sentiment: Template  # labels -> positive, negative, neutral


def read_prompts(path: Path) -> ExtractionPrompts:
    """The two prompts of the official file. Raises `InputError` naming the file and the function."""
    try:
        tree = ast.parse(path.read_text(encoding="utf-8"))
    except (OSError, SyntaxError, ValueError) as error:
        raise InputError("the benchmark's toolkit/utils/qwen.py", str(error), file=path) from error
    return ExtractionPrompts(
        _template(tree, path, "reason_to_openset_qwen"), _template(tree, path, "openset_to_sentiment_qwen")
    )


def clean_reply(reply: str) -> str:
    """A model's reply without lead-in words, a leading colon and line breaks, as the official script cleans it."""
    reply = reply.strip()
    for word in _LEAD_INS:
        reply = reply.removeprefix(word)
    reply = reply.strip().removeprefix(":").removeprefix(_WIDE_COLON)
    return reply.strip().replace("\n", "").strip()


def _template(tree: ast.Module, path: Path, function: str) -> Template:
    outer = next((n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == function), None)
    strings = [
        node.value
        for inner in (ast.walk(outer) if outer else ())
        if isinstance(inner, ast.FunctionDef) and inner.name == _TEMPLATE
        for node in ast.walk(inner)
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.JoinedStr)
    ]
    parts = strings[0].values if strings else []
    slots = [at for at, part in enumerate(parts) if isinstance(part, ast.FormattedValue)]
    if len(strings) != 1 or len(slots) != 1 or ast.unparse(parts[slots[0]].value) != _SLOT:  # type: ignore[attr-defined]
        raise InputError(f"one f-string around {_SLOT!r} in {_TEMPLATE}", f"{len(strings)}", file=path, field=function)
    return Template(_text(parts[: slots[0]]), _text(parts[slots[0] + 1 :]))


def _text(parts: list[ast.expr]) -> str:
    return "".join(str(part.value) for part in parts if isinstance(part, ast.Constant))
