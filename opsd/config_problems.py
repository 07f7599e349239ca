"""pydantic's findings about a config, said as `InputError`s: where, which key, expected what, found what."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from pydantic import BaseModel, ValidationError

from opsd.errors import InputError, did_you_mean
from opsd.sections import Config

Place = tuple[str, ...]  # (), (section,) or (section, key)

SECTIONS = {name: cast(type[BaseModel], field.annotation) for name, field in Config.model_fields.items()}


@dataclass(frozen=True)
class Source:
    """Where a key was said."""

    file: str | Path
    line: int | None = None


def problems(error: ValidationError, values: dict[str, Any], sources: dict[Place, Source]) -> list[InputError]:
    """pydantic's findings as InputErrors: one per field, the alternatives of a union joined by "or"."""
    found: dict[Place, list[Any]] = {}
    for detail in error.errors():
        place = tuple(str(part) for part in detail["loc"][:2])
        if detail["type"] == "check":
            field = detail["ctx"]["field"]
            place = tuple(field.split(".")) if "." in field else (place[0], field)
        found.setdefault(place, []).append(detail)
    said = [_problem(place, details, values, sources) for place, details in found.items()]
    return sorted(said, key=lambda problem: problem.line or 0)


def _problem(place: Place, details: list[Any], values: dict[str, Any], sources: dict[Place, Source]) -> InputError:
    source = next(sources[place[:n]] for n in (2, 1, 0) if place[:n] in sources)
    expected = " or ".join(dict.fromkeys(_expected(detail) for detail in details))
    hint: str | None = None
    if details[0]["type"] == "extra_forbidden":
        expected, found, hint = _unknown(place)
    elif details[0]["type"] == "missing":
        found = "nothing"
    elif details[0]["type"] == "check":
        found = details[0]["ctx"]["found"]
    else:
        section = values.get(place[0])
        value = section.get(place[1]) if len(place) > 1 and isinstance(section, dict) else section
        found, hint = repr(value), _value_hint(details, value)
    return InputError(expected, found, file=source.file, line=source.line, field=".".join(place), hint=hint)


def _unknown(place: Place) -> tuple[str, str, str | None]:
    """expected, found and hint for a section or key that does not exist."""
    name = place[-1]
    homes = [f"{section}.{name}" for section, model in SECTIONS.items() if name in model.model_fields]
    hint = f"did you mean {' or '.join(map(repr, homes))}?" if homes else None
    if len(place) == 1:
        return (
            f"a section, one of {', '.join(SECTIONS)}",
            "an unknown section",
            hint or did_you_mean(name, SECTIONS),
        )
    keys = list(SECTIONS[place[0]].model_fields)
    hint = hint or did_you_mean(name, keys)
    return f"a key of section {place[0]}, one of {', '.join(keys)}", "an unknown key", hint


def _expected(detail: Any) -> str:
    """What a value should have been, in words."""
    context = detail.get("ctx", {})
    kind = detail["type"]
    if kind == "check":
        return str(context["expected"])
    if kind == "literal_error":
        return f"one of {context['expected']}".replace("'", "").replace(" or ", ", ")
    words = {
        "int_type": "a whole number",
        "float_type": "a number",
        "finite_number": "a finite number",
        "bool_type": "true or false",
        "string_type": "text",
        "string_too_short": "text that is not empty",
        "tuple_type": "a list",
        "dict_type": "a mapping",
        "missing": "a value",
        "path_type": "a path",
        "model_type": "keys with values",
        "greater_than": f"a value > {context.get('gt')}",
        "greater_than_equal": f"a value >= {context.get('ge')}",
        "less_than": f"a value < {context.get('lt')}",
        "less_than_equal": f"a value <= {context.get('le')}",
    }
    return words.get(kind) or str(detail["msg"])


def _value_hint(details: list[Any], value: Any) -> str | None:
    literal = next((detail["ctx"]["expected"] for detail in details if detail["type"] == "literal_error"), None)
    if literal is not None:
        return did_you_mean(value, [part.strip("' ") for part in literal.replace(" or ", ",").split(",")])
    if any(detail["type"] == "string_type" for detail in details):
        return "quote it: YAML reads words like yes, no, on, off and bare numbers as other types"
    return None
