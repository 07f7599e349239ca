"""The benchmark's files, in and out, and what is said of files that are missing or wrong."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest

from opsd.affect.unibench.datasets import DATASETS
from opsd.affect.unibench.files import (
    OFFICIAL,
    Predictions,
    digest,
    find_predictions,
    made_by,
    read_items,
    read_responses,
    usable,
    write_items,
    write_responses,
)
from opsd.affect.unibench.npz import read_npz
from opsd.affect.unibench.tables import read_table
from opsd.affect.unibench.truth import read_truth
from opsd.affect.unibench.wheels import load_wheels
from opsd.errors import InputError
from tests.affect.wheel_files import write_corpus, write_csv, write_data, write_predictions, write_wheels, write_xlsx


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "data")


def said(error):
    return str(error.value)


def test_truth_of_every_kind(data):
    assert read_truth(DATASETS["mer2023"], data) == {"a1": "happy", "a2": "angry", "a3": "neutral"}
    codes = ["anger", "joy", "sadness", "neutral", "disgust", "fear", "surprise"]
    assert list(read_truth(DATASETS["meld"], data).values()) == codes
    iemocap = read_truth(DATASETS["iemocapfour"], data)
    assert list(iemocap) == [f"Ses05F_impro01_F00{n}" for n in range(4)], "session 5 is the test set"
    assert list(iemocap.values()) == ["happy", "sad", "neutral", "anger"]
    assert read_truth(DATASETS["sims"], data) == {"v1": 1.5, "v2": -0.4, "v3": 0.0}
    assert read_truth(DATASETS["ovmerdplus"], data) == {"o1": "happy, glad", "o2": "neutral", "o3": "sad"}


def test_the_nine_sets_have_the_published_sizes():
    assert {d.title: d.clips for d in DATASETS.values()} == {
        "MER2023": 411, "MER2024": 1169, "MELD": 2610, "IEMOCAP": 1241, "MOSI": 686, "MOSEI": 4659, "SIMS": 457,
        "SIMS v2": 1034, "OV-MERD+": 532,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        ({"emo": 9}, "field \"test_corpus['c']['emo']\": expected a label, or its number below 7; found 9"),
        ({"emo": True}, "found True"),
        ({"val": 1}, "field 'c': expected a dictionary with 'emo'; found keys val"),
        (3, "field 'c': expected a dictionary with 'emo'; found int"),
    ],
)
def test_a_wrong_label_is_named(tmp_path, entry, expected):
    path = write_corpus(tmp_path / "meld-process" / "label.npz", "test_corpus", {"c": entry})
    with pytest.raises(InputError) as error:
        read_truth(DATASETS["meld"], tmp_path)
    assert said(error).startswith(str(path)) and expected in said(error)


@pytest.mark.parametrize("value", ["high", None, float("nan"), float("inf")])
def test_a_wrong_valence_is_named(tmp_path, value):
    write_corpus(tmp_path / "sims-process" / "label.npz", "test_corpus", {"c": {"val": value}})
    with pytest.raises(InputError, match=r"label\.npz: field .*'c'.*'val'.*expected a number"):
        read_truth(DATASETS["sims"], tmp_path)


def test_missing_and_damaged_label_files(data):
    path = data / "sims-process" / "label.npz"
    path.write_bytes(b"not a zip")
    with pytest.raises(InputError, match=r"label\.npz: expected an \.npz archive"):
        read_truth(DATASETS["sims"], data)
    path.unlink()
    with pytest.raises(InputError, match=r"label\.npz: expected an existing file"):
        read_truth(DATASETS["sims"], data)
    write_corpus(data / "mer2023-dataset-process" / "label-6way.npz", "train_corpus", {"c": {"emo": "happy"}})
    with pytest.raises(InputError, match="field 'test1_corpus': expected the array 'test1_corpus'; found train_corpus"):
        read_truth(DATASETS["mer2023"], data)
    write_corpus(data / "iemocap-process" / "label_4way.npz", "whole_corpus", {"Ses01F_a": {"emo": 0}})
    with pytest.raises(InputError, match="expected clips of session 5"):
        read_truth(DATASETS["iemocapfour"], data)
    write_csv(data / "ovmerdplus-process" / "ovlabel.csv", "name,labels", "a,b")
    with pytest.raises(InputError, match=r"ovlabel\.csv:1: field 'openset'"):
        read_truth(DATASETS["ovmerdplus"], data)
    write_csv(data / "ovmerdplus-process" / "ovlabel.csv", "name,openset", "o1,happy", ",sad")
    with pytest.raises(InputError, match=r"ovlabel\.csv:3: field 'name': expected text"):
        read_truth(DATASETS["ovmerdplus"], data)


def told(read, path: Path, want) -> float:
    """The share of a file's bytes whose damage is told, by name; where it is not, what is read must be the same."""
    content, places = path.read_bytes(), range(0, path.stat().st_size, 5)
    messages = []
    for at in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :])
        try:
            found = read(path)
        except InputError as error:
            messages.append(str(error))
        else:
            assert found == want or want is None
    assert all(str(path) in message for message in messages)
    return len(messages) / len(places)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_flipped_byte_anywhere_is_told_or_changes_nothing(tmp_path, save):
    text = "looks happy, and sounds it " * 30
    save(tmp_path / "c.npz", name2reason=np.array({"a": text}, dtype=object))
    assert told(lambda path: read_npz(path, "name2reason"), tmp_path / "c.npz", [{"a": text}]) > 0.05


def test_a_damaged_workbook_is_told(tmp_path):
    path = write_xlsx(tmp_path / "wheel1.xlsx", [("level1", "level2", "level3"), *[("a", "b", "c")] * 9])
    assert told(lambda path: read_table(path, ("level1",)), path, None) > 0.05


class Runs:
    """What a pickle must not be able to do."""

    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_pickle_cannot_run_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savez(tmp_path / "bad.npz", name2reason=np.array({"a": Runs()}, dtype=object))
    with pytest.raises(InputError, match="field 'name2reason': expected an array of plain values"):
        read_npz(tmp_path / "bad.npz", "name2reason")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_age_are_read(tmp_path, protocol):
    values = {np.str_("k"): [np.str_("ü"), np.float64(1.5), np.int64(3), b"\xff", np.array(["a"]), np.arange(3.0)]}
    array, stream = np.array(values, dtype=object), io.BytesIO()
    np.lib.format.write_array_header_1_0(stream, {"descr": "|O", "fortran_order": False, "shape": ()})
    pickle.dump(array, stream, protocol=protocol)
    assert b"numpy.core.multiarray" in _renamed(stream.getvalue())
    for data in (stream.getvalue(), _renamed(stream.getvalue())):
        with zipfile.ZipFile(tmp_path / "x.npz", "w") as archive:
            archive.writestr("a.npy", data)
        assert repr(read_npz(tmp_path / "x.npz", "a")) == repr([values])


def _renamed(data):
    """The same pickle with the module names of numpy 1."""
    for part in (b"multiarray", b"numeric"):
        new, old = b"numpy._core." + part, b"numpy.core." + part
        data = data.replace(b"c" + new + b"\n", b"c" + old + b"\n")  # protocols 2 and 3
        data = data.replace(bytes([0x8C, len(new)]) + new, bytes([0x8C, len(old)]) + old)  # since 4
    at = data.index(b"\x80")  # a frame of protocol 4 would have to say its new length: leave frames out
    if data[at + 2 : at + 3] == b"\x95":
        data = data[: at + 2] + data[at + 11 :]
    return data


def test_npz_gives_what_numpy_gives(tmp_path):
    arrays = {
        "a": np.arange(6, dtype=np.int32).reshape(2, 3),
        "f": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "u": np.array(["happy", "sad ü"]),
        "o": np.array([["x"], "y", 3.5, None, np.float32(1), np.array([1, 2])], dtype=object),
        "s": np.array("lexicon"),
    }
    np.savez_compressed(tmp_path / "x.npz", **arrays)
    for name, array in arrays.items():
        (found,) = read_npz(tmp_path / "x.npz", name)
        assert repr(found) == repr(array.tolist())


def test_responses_and_labels_come_back(tmp_path):
    place = Predictions(tmp_path / "results-meld", "checkpoint_000060_loss_0.1")
    write_responses(place.responses, {"a": "He is glad.", "b": ""})
    assert read_responses(place.responses, ["b"]) == {"b": ""}
    stored = np.load(place.responses, allow_pickle=True)["name2reason"].tolist()
    assert stored == {"a": "He is glad.", "b": ""}, "the official script reads it"
    said = digest({"a": "He is glad.", "b": ""})
    write_items(place.openset, {"a": "[glad]", "b": "[]"}, "lexicon", said)
    official = np.load(place.openset)
    assert list(official["filenames"]) == ["a", "b"] and list(official["fileitems"]) == ["[glad]", "[]"]
    assert read_items(place.openset, ["a"]) == {"a": "[glad]"}
    assert made_by(place.openset) == "lexicon"
    assert usable(place.openset, "lexicon", said) and not usable(place.openset, "other", said)
    assert not usable(place.openset, "lexicon", digest({"a": "He is sad.", "b": ""}))
    np.savez_compressed(place.sentiment, filenames=["a"], fileitems=["positive"])
    assert made_by(place.sentiment) == OFFICIAL
    with pytest.raises(InputError, match="field 'filenames': expected all 2 test clips; found 1 missing, such as 'b'"):
        read_items(place.sentiment, ["a", "b"])


@pytest.mark.parametrize("items", [np.array({"a": "happy"}, dtype=object), np.array("happy"), np.array(3)])
def test_items_that_are_no_list(tmp_path, items):
    path = write_predictions(tmp_path, "meld", "c-openset", filenames=["a"], fileitems=items)
    with pytest.raises(InputError, match="field 'fileitems': expected one entry per clip"):
        read_items(path, ["a"])


def test_a_clip_that_stands_twice(tmp_path):
    path = write_predictions(tmp_path, "meld", "c-openset", filenames=["a", "b", "a"], fileitems=["[x]", "[y]", "[z]"])
    with pytest.raises(InputError, match="field 'filenames': expected every clip once; found 'a' twice"):
        read_items(path, ["a"])


@pytest.mark.parametrize("response", [None, float("nan"), ["glad"]])
def test_a_response_that_is_no_text(tmp_path, response):
    path = write_predictions(tmp_path, "meld", "c", name2reason=np.array({"a": response}, dtype=object))
    with pytest.raises(InputError, match="field 'name2reason': expected text for clip 'a'; found"):
        read_responses(path, ["a"])


def test_items_that_do_not_pair_up(tmp_path):
    path = write_predictions(tmp_path, "meld", "c-openset", filenames=["a", "b"], fileitems=["[x]"])
    with pytest.raises(InputError, match="field 'fileitems': expected 2 items, one per clip; found 1"):
        read_items(path, ["a"])


def test_which_checkpoint_is_scored(tmp_path):
    meld = DATASETS["meld"]
    with pytest.raises(InputError, match="expected a folder results-meld"):
        find_predictions(tmp_path, meld, None, "last")
    for stem in ("checkpoint_000030_loss_0.4", "checkpoint_000060_loss_0.2"):
        write_predictions(tmp_path, "meld", f"one/{stem}", name2reason=np.array({}, dtype=object))
    write_predictions(tmp_path, "meld", "one/checkpoint_000060_loss_0.2-openset", filenames=[], fileitems=[])
    write_predictions(tmp_path, "meld", "one/checkpoint_000090_loss_0.3-openset-sentiment", filenames=[], fileitems=[])
    stems = ["checkpoint_000030_loss_0.4", "checkpoint_000060_loss_0.2", "checkpoint_000090_loss_0.3"]
    assert [p.stem for p in find_predictions(tmp_path, meld, None, "best")] == stems
    assert [p.stem for p in find_predictions(tmp_path, meld, None, "last")] == stems[-1:]
    assert [p.stem for p in find_predictions(tmp_path, meld, "one", "checkpoint_000060")] == stems[1:2]
    with pytest.raises(InputError, match="field '--checkpoint': expected one of checkpoint_000030_loss"):
        find_predictions(tmp_path, meld, None, "checkpoint_000061")
    write_predictions(tmp_path, "meld", "two/checkpoint_000030_loss_0.4", name2reason=np.array({}, dtype=object))
    with pytest.raises(InputError, match=r"expected one model; found one, two \(name it with --name\)"):
        find_predictions(tmp_path, meld, None, "last")
    assert find_predictions(tmp_path, meld, "two", "last")[0].folder.name == "two"
    with pytest.raises(InputError, match="expected responses of 'three'"):
        find_predictions(tmp_path, meld, "three", "last")


def test_missing_wheel_tables_come_in_one_message(tmp_path):
    write_wheels(tmp_path)
    (tmp_path / "wheel3.xlsx").unlink()
    (tmp_path / "format.csv").unlink()
    with pytest.raises(InputError) as error:
        load_wheels(tmp_path)
    assert "wheel3.xlsx: expected an existing file" in said(error) and "format.csv" in said(error)


def test_wrong_wheel_tables_are_named_by_row_and_column(tmp_path):
    write_wheels(tmp_path)
    write_xlsx(tmp_path / "wheel4.xlsx", [("level1", "level2"), ("a", "b")])
    with pytest.raises(InputError, match=r"wheel4\.xlsx:1: field 'level3': expected the column 'level3'"):
        load_wheels(tmp_path)
    write_xlsx(tmp_path / "wheel4.xlsx", [("level1", "level2", "level3"), (None, "b", "c")])
    with pytest.raises(InputError, match=r"wheel4\.xlsx:2: field 'level1': expected a word in the first row"):
        load_wheels(tmp_path)
    write_wheels(tmp_path)
    header = [f"{kind}_run{n}" for n in range(1, 9) for kind in ("word", "synonym")]
    row = ["happy", "[]"] * 8
    row[4] = "hapy"
    write_xlsx(tmp_path / "synonym.xlsx", [tuple(header), tuple(["happy", "[]"] * 8), tuple(row)])
    with pytest.raises(InputError, match=r"synonym\.xlsx:3: field 'word_run3': expected a word of one of the wheels"):
        load_wheels(tmp_path)
    (tmp_path / "synonym.xlsx").write_bytes(b"PK nothing")
    with pytest.raises(InputError, match=r"synonym\.xlsx: expected an \.xlsx workbook"):
        load_wheels(tmp_path)
    write_wheels(tmp_path)
    (tmp_path / "format.csv").write_bytes(b"name,format\n\xff,x\n")
    with pytest.raises(InputError, match=r"format\.csv: expected a CSV file in UTF-8"):
        load_wheels(tmp_path)


def test_a_workbook_as_a_spreadsheet_writes_it(tmp_path):
    """Rich text in runs, a phonetic hint, numbers, a gap between cells, an absolute link, columns past Z."""
    space = 'xmlns="http://schemas.openxmlformats.org/spreadsheetml/2006/main"'
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships"
    with zipfile.ZipFile(tmp_path / "t.xlsx", "w") as book:
        book.writestr(
            "xl/workbook.xml",
            f'<workbook {space} xmlns:r="{office}"><sheets><sheet name="s" sheetId="1" r:id="r1"/></sheets></workbook>',
        )
        link = '<Relationships><Relationship Id="r1" Target="/xl/worksheets/first.xml"/></Relationships>'
        book.writestr("xl/_rels/workbook.xml.rels", link)
        book.writestr(
            "xl/sharedStrings.xml",
            f"<sst {space}><si><t>a</t></si><si><t>b</t></si>"
            "<si><r><t>ha</t></r><r><t>ppy</t></r><rPh sb='0' eb='1'><t>hint</t></rPh></si></sst>",
        )
        book.writestr(
            "xl/worksheets/first.xml",
            f'<worksheet {space}><sheetData><row r="1"><c r="A1" t="s"><v>0</v></c><c r="AB1" t="s"><v>1</v></c></row>'
            '<row r="3"><c r="A3" t="s"><v>2</v></c><c r="AB3"><v>7</v></c></row></sheetData></worksheet>',
        )
    (row,) = read_table(tmp_path / "t.xlsx", ("a", "b"))
    assert (row.line, row["a"], row["b"]) == (3, "happy", "7")
