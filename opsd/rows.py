"""One row: its schema, and every check that one line of a JSONL file can fail.

A row has `id`, `prompt` (text, or chat messages whose content is text or parts), `rationale` (also called
`privileged_context`), and optionally `label`, `answer`, `subtitle`, `teacher_media` (parts that only the teacher
sees or hears) or, of images alone, their paths as `teacher_images`. A part is
`{"type": "text", "text": ...}`, `{"type": "image", "image": PATH}`, `{"type": "video", "video": PATH}` (its frames)
or `{"type": "audio", "audio": PATH}`, which may be the same video file: its sound. Relative paths are relative to the
folder of the JSONL file.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from opsd.config import DataConfig, at_home
from opsd.errors import InputError, did_you_mean

FIELDS = (
    *("id", "prompt", "rationale", "privileged_context", "label", "answer", "subtitle", "teacher_media"),
    "teacher_images",
)
MEDIA_TYPES = ("image", "video", "audio")
PART_TYPES = ("text", *MEDIA_TYPES)
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Example:
    """One checked row. Every content is a list of parts; media are absolute paths."""

    id: str
    messages: list[
        dict[str, Any]
    ]  # {"role", "content": [{"type": "text", "text": str} | {"type": "image", "image": Path} | ...]}
    rationale: str | None
    label: str | None
    answer: str | None
    subtitle: str | None
    teacher_media: tuple[dict[str, Any], ...]  # parts as above, none of them text, that only the teacher gets
    file: Path
    line: int

    def problem(self, field: str, expected: str, found: str, hint: str | None = None) -> InputError:
        """An InputError that points at this row."""
        return InputError(expected, found, file=self.file, line=self.line, field=field, hint=hint)

    def media(self) -> Iterator[tuple[str, str, Path]]:
        """(field, kind, path) of every medium, kind being "image", "video" or "audio"."""
        for i, message in enumerate(self.messages):
            for j, part in enumerate(message["content"]):
                if part["type"] != "text":
                    yield f"prompt[{i}].content[{j}].{part['type']}", part["type"], part[part["type"]]
        for i, part in enumerate(self.teacher_media):
            yield f"teacher_media[{i}].{part['type']}", part["type"], part[part["type"]]


@dataclass
class RowParser:
    """Parses one line, collecting its problems instead of stopping at the first. Used once."""

    file: Path
    line: int
    config: DataConfig
    need_rationale: bool
    problems: list[InputError] = field(default_factory=list)

    def refuse(self, field: str | None, expected: str, found: str, hint: str | None = None) -> None:
        self.problems.append(InputError(expected, found, file=self.file, line=self.line, field=field, hint=hint))

    def parse(self, raw: bytes) -> Example | None:
        """The example, or None when there were problems."""
        row = self._json(raw)
        if row is None:
            return None
        for name in row:
            if name not in FIELDS:
                self.refuse(
                    name,
                    f"a known field, one of {', '.join(FIELDS)}",
                    "an unknown field",
                    did_you_mean(name, FIELDS),
                )
        example = Example(
            id=self._id(row),
            messages=self._messages(row),
            rationale=self._rationale(row),
            label=self._label(row),
            answer=self._optional(row, "answer"),
            subtitle=self._optional(row, "subtitle"),
            teacher_media=self._teacher_media(row),
            file=self.file,
            line=self.line,
        )
        return None if self.problems else example

    def _json(self, raw: bytes) -> dict[str, Any] | None:
        try:
            row = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique_keys)
        except UnicodeDecodeError:
            self.refuse(None, "UTF-8 text", "bytes that are not UTF-8")
        except json.JSONDecodeError as error:
            self.refuse(None, "one JSON object on the line", f"{error.msg} at column {error.colno}")
        except (ValueError, RecursionError) as error:
            self.refuse(None, "one JSON object on the line", str(error))
        else:
            if isinstance(row, dict):
                return row
            self.refuse(None, "one JSON object on the line", f"a {type(row).__name__}")
        return None

    def _text(self, field: str, value: Any) -> str:
        """`value` when it is text with something in it; otherwise a problem and ""."""
        if not isinstance(value, str):
            self.refuse(field, "text", _kind(value))
        elif not value.strip():
            self.refuse(field, "text that is not empty", repr(value))
        elif any("\ud800" <= char <= "\udfff" for char in value):
            self.refuse(field, "text in valid Unicode", "half of a surrogate pair")
        else:
            return value
        return ""

    def _optional(self, row: dict[str, Any], name: str) -> str | None:
        """Text, or None for a field that is missing, null or empty."""
        value = row.get(name)
        return None if value is None or value == "" else self._text(name, value)

    def _id(self, row: dict[str, Any]) -> str:
        value = row.get("id")
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        return self._text("id", value)

    def _rationale(self, row: dict[str, Any]) -> str | None:
        names = [name for name in ("rationale", "privileged_context") if row.get(name) is not None]
        if len(names) == 2:
            self.refuse("privileged_context", "one of rationale, privileged_context", "both")
        if names:
            return self._text(names[0], row[names[0]])
        if self.need_rationale:
            self.refuse(
                "rationale",
                "text that is not empty",
                "nothing",
                "data.require_rationale=false allows rows without",
            )
        return None

    def _label(self, row: dict[str, Any]) -> str | None:
        label = self._optional(row, "label")
        options = self.config.labels
        if label and options is not None and label not in options:
            self.refuse("label", f"one of {', '.join(options)}", repr(label), did_you_mean(label, options))
        return label

    def _teacher_media(self, row: dict[str, Any]) -> tuple[dict[str, Any], ...]:
        """The parts of `teacher_media`, or those that the paths of `teacher_images` stand for."""
        names = [name for name in ("teacher_media", "teacher_images") if row.get(name) is not None]
        if len(names) == 2:
            self.refuse("teacher_images", "one of teacher_media, teacher_images", "both")
        if not names:
            return ()
        name, value = names[0], row[names[0]]
        if not isinstance(value, list):
            self.refuse(name, f"a list of {'parts' if name == 'teacher_media' else 'paths'}", _kind(value))
            return ()
        if name == "teacher_images":
            return tuple({"type": "image", "image": self._medium(f"{name}[{i}]", path)} for i, path in enumerate(value))
        return tuple(self._part(f"{name}[{i}]", part, MEDIA_TYPES) for i, part in enumerate(value))

    def _medium(self, field: str, value: Any) -> Path:
        """The absolute path of a file that exists; whether it decodes, `opsd.prompts.verify` says."""
        name = self._text(field, value)
        path = (self.file.parent / at_home(Path(name))).absolute() if name else self.file
        if "://" in name:
            self.refuse(field, "the path of a local file", repr(name))
        elif name and not path.is_file():
            self.refuse(field, "an existing file", f"no file at {path}")
        return path

    def _messages(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        prompt = row.get("prompt")
        if not isinstance(prompt, list):
            return [{"role": "user", "content": [{"type": "text", "text": self._text("prompt", prompt)}]}]
        messages = [self._message(f"prompt[{i}]", message) for i, message in enumerate(prompt)]
        roles = [message["role"] for message in messages]
        if not roles or roles[-1] in ("system", "assistant"):
            found = f"{roles[-1]!r} last" if roles else "no messages"
            self.refuse("prompt", "chat messages that end with the user's", found)
        return messages

    def _message(self, field: str, message: Any) -> dict[str, Any]:
        if not isinstance(message, dict) or set(message) != {"role", "content"}:
            found = f"keys {', '.join(map(str, message))}" if isinstance(message, dict) else _kind(message)
            self.refuse(field, "a message with role and content", found)
            return {"role": "user", "content": []}
        role, content = message["role"], message["content"]
        if role not in ROLES:
            self.refuse(f"{field}.role", f"one of {', '.join(ROLES)}", repr(role), did_you_mean(role, ROLES))
        if not isinstance(content, list):
            return {
                "role": role,
                "content": [{"type": "text", "text": self._text(f"{field}.content", content)}],
            }
        if not content:
            self.refuse(f"{field}.content", "at least one part", "none")
        return {
            "role": role,
            "content": [self._part(f"{field}.content[{i}]", part) for i, part in enumerate(content)],
        }

    def _part(self, field: str, part: Any, types: tuple[str, ...] = PART_TYPES) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in types:
            found = f"type {kind!r}" if isinstance(part, dict) else _kind(part)
            self.refuse(field, f"a part whose type is one of {', '.join(types)}", found)
        elif set(part) != {"type", kind}:
            self.refuse(field, f"the keys type and {kind}", f"keys {', '.join(map(str, part))}")
        elif kind == "text":
            return {"type": "text", "text": self._text(f"{field}.text", part["text"])}
        else:
            return {"type": kind, kind: self._medium(f"{field}.{kind}", part[kind])}
        return {"type": "text", "text": ""}


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    again = next((key for key in keys if keys.count(key) > 1), None)
    if again is not None:
        raise ValueError(f"the key {again!r} twice")
    return dict(pairs)


def _kind(value: Any) -> str:
    """What JSON calls a value."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), f"the number {value!r}")
