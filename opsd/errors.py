"""The one exception for everything a user can get wrong, and the message it carries."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


class InputError(Exception):
    """A mistake in what the user gave, said in one line.

    The line is `FILE:LINE: field 'FIELD': expected EXPECTED; found FOUND (HINT)`; parts that are not known
    are left out. `file` may also name a source that is no file, such as "command line".
    """

    def __init__(
        self,
        expected: str,
        found: str,
        *,
        file: str | Path | None = None,
        line: int | None = None,
        field: str | None = None,
        hint: str | None = None,
    ) -> None:
        self.expected, self.found, self.file, self.line = expected, found, file, line
        self.field, self.hint = field, hint
        where = "" if file is None else f"{file}: " if line is None else f"{file}:{line}: "
        subject = "" if field is None else f"field {field!r}: "
        tail = "" if hint is None else f" ({hint})"
        super().__init__(f"{where}{subject}expected {expected}; found {found}{tail}")


class MediumError(InputError):
    """A file of images, video or sound that does not decode."""


class InputErrors(InputError):
    """Several mistakes found in one pass: one line each, the first `limit` of them."""

    def __init__(self, problems: Sequence[InputError], limit: int = 10) -> None:
        self.problems = tuple(problems)
        lines = [str(problem) for problem in self.problems[:limit]]
        if len(self.problems) > limit:
            lines.append(f"... and {len(self.problems) - limit} more")
        Exception.__init__(self, "\n".join(lines))
        first = self.problems[0]
        self.expected, self.found, self.file, self.line = first.expected, first.found, first.file, first.line
        self.field, self.hint = first.field, first.hint


def raise_all(problems: Sequence[InputError], limit: int = 10) -> None:
    """Raise nothing for no problem, the problem itself for one, `InputErrors` for several."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        raise InputErrors(problems, limit)


def did_you_mean(name: object, valid: Iterable[str]) -> str | None:
    """The hint "did you mean 'x'?" for the valid name nearest to `name`, or None when none is near."""
    near = difflib.get_close_matches(str(name), list(valid), n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else None


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Make a failed write name its file: OSErrors without a filename get `path`, and errors of native writers
    (safetensors) that only carry the number in their text become the OSError they stand for."""
    try:
        yield
    except OSError as error:
        if error.filename is None:
            error.filename = str(path)
        raise
    except Exception as error:
        native = re.search(r"\(os error (\d+)\)", str(error))
        if native is None:
            raise
        number = int(native.group(1))
        raise OSError(number, os.strerror(number), str(path)) from error


@contextmanager
def explained(expected: str, field: str) -> Iterator[None]:
    """Where other libraries read what the user named: any failure of theirs becomes an `InputError` about `field`."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        lines = str(error).strip().splitlines() or ["no reason given"]
        raise InputError(expected, f"{type(error).__name__}: {lines[0].strip()}", field=field) from error
