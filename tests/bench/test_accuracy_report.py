"""`python -m bench.accuracy` on a tiny shape: it finds what is right right, and what is wrong wrong."""

from __future__ import annotations

import json

import pytest
import torch

from bench import accuracy
from opsd_kernels import rows_native

BACKEND = "torch" if rows_native.obstacle() else "native"


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(accuracy, "SHAPES", {"tiny": (40, 700, 24)})


def test_every_line_holds_and_is_kept(tmp_path, capsys):
    assert accuracy.main(["--backend", BACKEND, "--out", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text(encoding="utf-8"))["rows"]
    fp32, bf16 = 13, 10
    assert len(rows) == 3 * 2 * (fp32 + bf16)
    assert all(row["ok"] and row["error"] <= row["allowed"] for row in rows)
    assert f"{len(rows)} of {len(rows)} hold" in capsys.readouterr().out


MUTANTS = {
    "doubled gradient": (lambda value, mib: value + (value - value.detach()), {"dX", "dW"}),
    "no gradient": (lambda value, mib: value.detach() + 0 * value, {"dX", "dW"}),
    "shifted value": (lambda value, mib: value - 1e-2, {"value", "least value, below 0 by"}),
    "no number": (lambda value, mib: value * torch.nan, {"value", "dX", "dW", "least value, below 0 by"}),
    "no number in chunks": (
        lambda value, mib: value if mib == 512 else value * torch.nan,
        {"chunks, value", "chunks, dX", "chunks, dW"},
    ),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_a_wrong_one_is_told(mutant, monkeypatch, capsys):
    right, (change, expected) = accuracy.fused, MUTANTS[mutant]
    monkeypatch.setattr(accuracy, "DIVERGENCES", {"jsd": accuracy.DIVERGENCES["jsd"]})
    monkeypatch.setattr(accuracy, "fused", lambda *args: lambda *inputs: change(right(*args)(*inputs), args[2]))
    assert accuracy.main(["--backend", BACKEND]) == 1
    failed = {line.split("FAILS ")[1][:27].strip() for line in capsys.readouterr().out.splitlines() if "FAILS" in line}
    assert expected <= failed
