"""Tables as the benchmark publishes them: .csv, and the first sheet of an .xlsx file, as rows with line numbers."""

from __future__ import annotations

import csv
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from xml.etree import ElementTree

from opsd.affect.unibench.archive import DAMAGE
from opsd.errors import InputError

_MAIN: Final = "{http://schemas.openxmlformats.org/spreadsheetml/2006/main}"
_RELATION: Final = "{http://schemas.openxmlformats.org/officeDocument/2006/relationships}id"
# What pandas, which the benchmark reads its tables with, takes for an empty cell.
_EMPTY: Final = {
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A"),
    *("NA", "NULL", "NaN", "None", "n/a", "nan", "null"),
}
_TSV: Final[dict[str, Any]] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE}


@dataclass(frozen=True)
class Row:
    """One row below the header. A cell that is missing, or means "nothing" to pandas, is ""."""

    file: Path
    line: int  # as a spreadsheet or an editor counts them: the header is line 1
    cells: dict[str, str]

    def __getitem__(self, column: str) -> str:
        return self.cells[column]

    def text(self, column: str) -> str:
        """The cell, stripped. Raises `InputError` when it is empty."""
        cell = self.cells[column].strip()
        if not cell:
            raise self.problem(column, "text", "an empty cell")
        return cell

    def problem(self, column: str, expected: str, found: str) -> InputError:
        """An InputError that points at this cell."""
        return InputError(expected, found, file=self.file, line=self.line, field=column)


def read_table(path: Path, columns: tuple[str, ...], *, literal: bool = False) -> list[Row]:
    """The rows of an .xlsx, .csv or .tsv file that has at least `columns`, blank rows left out.

    literal: "None" and its like are text, as in what people say. Raises `InputError` naming file and column.
    """
    if not path.is_file():
        raise InputError("an existing file", "no file", file=path)
    lines = _xlsx(path) if path.suffix == ".xlsx" else _csv(path)
    if not lines:
        raise InputError(f"a header with {', '.join(columns)}", "an empty table", file=path)
    header = [name.strip() for name in lines[0][1]]
    for column in columns:
        if column not in header:
            raise InputError(f"the column {column!r}", f"columns {', '.join(header)}", file=path, line=1, field=column)
    rows = []
    for line, cells in lines[1:]:
        if path.suffix != ".xlsx" and any(cell.strip() for cell in cells[len(header) :]):  # a stray comma moves columns
            raise InputError(f"{len(header)} cells, as the header has", str(len(cells)), file=path, line=line)
        padded = [*cells, *[""] * (len(header) - len(cells))]
        named = {
            name: "" if cell in _EMPTY and not literal else cell for name, cell in zip(header, padded, strict=False)
        }
        if any(named.values()):
            rows.append(Row(path, line, named))
    return rows


def _csv(path: Path) -> list[tuple[int, list[str]]]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            # the one .tsv here, MIntRec 2.0's, is written and read without quoting: a quotation mark is a character
            reader = csv.reader(file, **_TSV) if path.suffix == ".tsv" else csv.reader(file)
            return [(reader.line_num, cells) for cells in reader if cells]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError("a CSV file in UTF-8", str(error), file=path) from error


def _xlsx(path: Path) -> list[tuple[int, list[str]]]:
    """(row number, cells) of the first sheet. Formulas count as their stored value."""
    try:
        with zipfile.ZipFile(path) as book:
            shared = _shared_strings(book)
            sheet = ElementTree.fromstring(book.read(_first_sheet(book)))
            return [
                (int(row.get("r", at)), _cells(row, shared))
                for at, row in enumerate(sheet.iter(f"{_MAIN}row"), start=1)
            ]
    except (*DAMAGE, KeyError, IndexError, ValueError, StopIteration, ElementTree.ParseError) as error:
        raise InputError("an .xlsx workbook", f"{type(error).__name__}: {error}", file=path) from error


def _first_sheet(book: zipfile.ZipFile) -> str:
    sheet = next(ElementTree.fromstring(book.read("xl/workbook.xml")).iter(f"{_MAIN}sheet"), None)
    if sheet is None:
        raise ValueError("a workbook without sheets")
    links = ElementTree.fromstring(book.read("xl/_rels/workbook.xml.rels"))
    target = next(link.get("Target", "") for link in links if link.get("Id") == sheet.get(_RELATION))
    return target.lstrip("/") if target.startswith("/") else f"xl/{target}"


def _shared_strings(book: zipfile.ZipFile) -> list[str]:
    if "xl/sharedStrings.xml" not in book.namelist():
        return []
    return [_text(item) for item in ElementTree.fromstring(book.read("xl/sharedStrings.xml")).iter(f"{_MAIN}si")]


def _text(item: ElementTree.Element) -> str:
    """The text of a string item: plain, or in runs; phonetic hints left out."""
    runs = [item, *item.findall(f"{_MAIN}r")]
    return "".join(text.text or "" for run in runs for text in run.findall(f"{_MAIN}t"))


def _cells(row: ElementTree.Element, shared: list[str]) -> list[str]:
    cells: list[str] = []
    for cell in row.iter(f"{_MAIN}c"):
        place = re.match(r"[A-Z]+", cell.get("r", ""))
        at = _column(place.group()) if place else len(cells)
        cells += [""] * (at - len(cells))
        kind, value, inline = cell.get("t"), cell.find(f"{_MAIN}v"), cell.find(f"{_MAIN}is")
        if inline is not None:
            cells.append(_text(inline))
        else:
            raw = "" if value is None else value.text or ""
            cells.append(shared[int(raw)] if kind == "s" else raw)
    return cells


def _column(letters: str) -> int:
    """0 for A, 25 for Z, 26 for AA."""
    at = 0
    for letter in letters:
        at = 26 * at + ord(letter) - ord("A") + 1
    return at - 1
