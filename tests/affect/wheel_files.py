"""A small set of emotion wheels of our own words, and writers of the benchmark's file layouts."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np

# (level1, level2, level3); None is a blank cell, which repeats the one above it
WHEELS: list[list[tuple[str | None, str | None, str | None]]] = [
    [  # knows everything but neutral
        ("Bright", "happy", "glad"),
        (None, None, "cheerful "),
        (None, "calm", "serene"),
        ("dark", "sad", "gloomy"),
        (None, "fear", "scared"),
        ("hot", "anger", "cross"),
        (None, "disgust", "revolted"),
        ("jolt", "surprise", "startled"),
    ],
    [  # "awed" is a joy here, and comes before "fear" in the alphabet
        ("joyful", "happy", "awed"),
        (None, "calm", None),  # stores "awed" again, now under calm
        ("low", "sad", "gloomy"),
        (None, "fear", "scared"),
        ("burning", "anger", "cross"),
        (None, "disgust", "revolted"),
        ("sudden", "surprise", "startled"),
    ],
    [  # no disgust; "gloomy" is written in two branches, the last counts
        ("joyful", "happy", "awed"),
        ("low", "sad", "gloomy"),
        ("burning", "anger", "cross"),
        (None, None, "gloomy"),
        ("sudden", "surprise", "startled"),
        ("worn", "fear", "scared"),
        ("low", "weary", "drained"),  # back in an earlier branch, which is walked first
        ("worn", "tired", "drained"),
    ],
    [
        ("joyful", "happy", "awed"),
        ("heavy", "sad", "anger"),  # anger is a leaf here, and no group of its own
        (None, "disgust", "revolted"),
        ("quick", "surprise", "fear"),
        (None, "calm", "serene"),
    ],
    [  # neither surprise nor disgust
        ("happy", "glad", "awed"),  # a level-1 word that others reach too
        ("sad", "gloomy", "fear"),
        ("anger", "cross", "mad"),
    ],
]
_WORDS = sorted({cell.lower().strip() for wheel in WHEELS for row in wheel for cell in row if cell})
# wheel word -> per run its synonyms; "fear" is said to be a synonym of "awed", so it goes where "awed" goes
SYNONYMS: dict[str, list[Any]] = {word: [f"['{word}']"] * 8 for word in _WORDS} | {
    "awed": ["['fear', 'dread']", "[wonder]", "", *["[]"] * 5],
    "calm": ["['joy']", *["[]"] * 7],
    "drained": ["['merry']", *["[]"] * 7],
    "happy": ["['joy', 'delight']", "delight, merry", *["['Upbeat ']"] * 6],
    "sad": ["[down]", *["['blue', \"low spirits\"]"] * 7],
    "anger": ["['angry','ire']", *["[angry]"] * 7],
    "surprise": ["['surprised']", *["[surprised]"] * 7],
}
_BASES = sorted({*_WORDS, "joy", "delight", "merry", "upbeat", "down", "blue", "low spirits", "angry", "ire", "dread"})
# base word -> other forms; capitals are kept, so "JOYS" is never found; "downs" leads to two bases
FORMATS: dict[str, str] = dict.fromkeys(_BASES, "") | {
    "joy": "joys,JOYS,joyous",
    "happy": "happily,happiness",
    "down": "downs",
    "blue": "blues,downs",
    "fear": "fears,fearful",
    "surprise": "surprises",
    "unlisted": "unlisteds",  # a base that no synonym run has
}


def write_xlsx(path: Path, rows: list[tuple[Any, ...]], shared: bool = True) -> Path:
    """A minimal workbook: strings shared, as spreadsheets store them, or inline."""
    strings: list[str] = []
    lines = []
    for r, row in enumerate(rows, start=1):
        cells = ""
        for c, value in enumerate(row):
            if value is None or value == "":
                continue
            place = f'r="{"ABCDEFGHIJKLMNOPQRSTUVWXYZ"[c]}{r}"'
            if shared:
                cells += f'<c {place} t="s"><v>{len(strings)}</v></c>'
                strings.append(f"<si><t>{escape(str(value))}</t></si>")
            else:
                cells += f'<c {place} t="inlineStr"><is><t>{escape(str(value))}</t></is></c>'
        lines.append(f'<row r="{r}">{cells}</row>')
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(path, "w") as book:
        sheets = '<sheets><sheet name="a" sheetId="1" r:id="rId7"/></sheets>'
        book.writestr("xl/workbook.xml", f'<workbook {space} xmlns:r="{office}">{sheets}</workbook>')
        link = '<Relationship Id="rId7" Type="x" Target="worksheets/sheet1.xml"/>'
        book.writestr("xl/_rels/workbook.xml.rels", f"<Relationships>{link}</Relationships>")
        book.writestr(
            "xl/worksheets/sheet1.xml", f"<worksheet {space}><sheetData>{''.join(lines)}</sheetData></worksheet>"
        )
        if shared:
            book.writestr("xl/sharedStrings.xml", f"<sst {space}>{''.join(strings)}</sst>")
    return path


def write_wheels(folder: Path) -> Path:
    """The seven tables of a wheel folder."""
    folder.mkdir(parents=True, exist_ok=True)
    for n, rows in enumerate(WHEELS, start=1):
        write_xlsx(folder / f"wheel{n}.xlsx", [("level1", "level2", "level3"), *rows], shared=n != 2)
    header = [f"{kind}_run{n}" for n in range(1, 9) for kind in ("word", "synonym")]
    rows = [tuple(cell for run in runs for cell in (f" {word.title()}", run)) for word, runs in SYNONYMS.items()]
    write_xlsx(folder / "synonym.xlsx", [tuple(header), *rows])
    lines = ["name,format", *(f'{base},"{forms}"' for base, forms in FORMATS.items())]
    (folder / "format.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def write_corpus(path: Path, corpus: str, clips: dict[str, dict[str, Any]]) -> Path:
    """A label file: one pickled dictionary, clip -> {"emo", "val"}."""
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **{corpus: np.array(clips, dtype=object)})
    return path


def write_csv(path: Path, header: str, *lines: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *lines]) + "\n", encoding="utf-8")
    return path


def write_data(folder: Path) -> Path:
    """Miniature copies of the nine preprocessed datasets: labels only."""
    mer = {"a1": {"emo": "happy", "val": 1.0}, "a2": {"emo": "angry", "val": -1.0}, "a3": {"emo": "neutral", "val": 0}}
    for year in ("mer2023", "mer2024"):
        write_corpus(folder / f"{year}-dataset-process" / "label-6way.npz", "test1_corpus", mer)
    codes = {f"test_dia0_utt{n}": {"emo": np.int64(n), "val": -10} for n in range(7)}
    write_corpus(folder / "meld-process" / "label.npz", "test_corpus", codes)
    sessions = {f"Ses0{s}F_impro01_F00{n}": {"emo": n, "val": -10} for s in (1, 5) for n in range(4)}
    write_corpus(folder / "iemocap-process" / "label_4way.npz", "whole_corpus", sessions)
    valences = {name: {"emo": 0, "val": val} for name, val in (("v1", 1.5), ("v2", np.float64(-0.4)), ("v3", 0.0))}
    for name in ("cmumosi", "cmumosei", "sims", "simsv2"):
        write_corpus(folder / f"{name}-process" / "label.npz", "test_corpus", valences)
    write_csv(folder / "ovmerdplus-process" / "ovlabel.csv", "name,openset", 'o1,"[happy, glad]"', "o2,", "o3,['sad']")
    return folder


def write_predictions(folder: Path, dataset: str, stem: str, **arrays: Any) -> Path:
    """results-DATASET/STEM.npz with the arrays; dictionaries are pickled as the official script does it."""
    path = folder / f"results-{dataset}" / f"{stem}.npz"
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path, **arrays)
    return path
