"""What docs/memory.md says of a 7B in four bits and with moments of 8, by dry runs without weights."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import opsd.train

GUIDE = (Path(__file__).parents[1] / "docs" / "memory.md").read_text(encoding="utf-8")


def table(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, list[str]]:
    """Rows of the guide's dry run of a 7B, by the name of the line."""
    for name, text in re.findall(r"<!-- file: (seven\S+) -->\n```\w+\n(.*?)```", GUIDE, re.DOTALL):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    command = re.search(r"python -m opsd\.train (seven\.yaml --dry-run .*)", GUIDE)
    assert command is not None
    assert opsd.train.main([*command[1].split(), *words]) == 0
    lines = [re.split(r"\s{2,}", line) for line in capsys.readouterr().out.splitlines()]
    return {line[0]: line[1:] for line in lines if len(line) > 3}


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_weights_and_step_of_a_7b(tmp_path, monkeypatch, capsys, quantize):
    if quantize == "nf4":
        pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    said = re.search(
        r"has ([\d,]+) MiB of weights instead of ([\d,]+), and its step is planned at ([\d,]+) instead of\s+([\d,]+)\.",
        GUIDE,
    )
    assert said is not None
    found = table(tmp_path, capsys, f"model.quantize={quantize}")
    student = found["MiB"].index("student")
    weights, step = (found[name][student] for name in ("weights", "all"))
    assert (weights, step) == ((said[1], said[3]) if quantize == "nf4" else (said[2], said[4]))


def test_moments_of_8_bits_need_no_library_to_be_planned(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = table(tmp_path, capsys, "optim.kind=adamw_8bit")
    moments, adapter = (float(found[name][0]) for name in ("optimizer", "adapter"))
    assert moments / adapter == pytest.approx(2.03 / 4, rel=0.02), "the adapter has 4 bytes a parameter"
