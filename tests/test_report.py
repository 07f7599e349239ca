"""Intervals, the table and the plot."""

from __future__ import annotations

from PIL import Image

from opsd.evaluate import percent
from opsd.intervals import wilson
from opsd.log import RunDir
from opsd.report import rows_of_table, write_report


def test_percent():
    assert percent(wilson(50, 100)) == "50.0% [40.4%, 59.6%], n = 100"


def record(step, view, accuracy, split="test"):
    sees = "rationale" if view == "teacher" else "none"
    return {
        "step": step,
        "split": split,
        "view": view,
        "privilege": sees,
        "accuracy": accuracy,
        "low": 0.0,
        "high": 1.0,
        "n": 9,
    }


def test_table_has_before_and_after_of_the_test_split(tmp_path, capsys):
    directory = RunDir(tmp_path)
    records = [
        record(0, "student", 0.4),
        record(0, "teacher", 1.0),
        record(0, "student", 0.1, "validation"),
        record(5, "student", 0.6),
        record(9, "student", 0.9),
        record(9, "teacher", 0.95),
    ]
    for r in records:
        directory.append("evaluations", r)
    for step in range(1, 10):
        directory.append("metrics", {"step": step, "loss": 1 / step, "divergence": 1 / step, "accuracy": step / 9})
    assert [(name, r["accuracy"]) for name, r in rows_of_table(records)] == [
        ("student, before", 0.4),
        ("teacher with rationale, before", 1.0),
        ("student, after", 0.9),
        ("teacher with rationale, after", 0.95),
    ]
    write_report(directory)
    out = capsys.readouterr().out
    assert "+50.0 points" in out and "90.0%" in out
    with Image.open(tmp_path / "report.png") as image:
        assert image.width > 800 and len(set(image.convert("L").resize((64, 32)).tobytes())) > 20


def test_half_a_line_is_not_a_record(tmp_path):
    directory = RunDir(tmp_path)
    directory.append("metrics", {"step": 1, "text": "größer"})
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "te')
    assert directory.read("metrics") == [{"step": 1, "text": "größer"}]
    directory.rewind(0)
    assert (tmp_path / "metrics.jsonl").read_text() == ""
