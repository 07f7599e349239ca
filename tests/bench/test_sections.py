"""A report survives its sections: one that raises, one that kills its process, one that never ends, no time left."""

from __future__ import annotations

import itertools
import subprocess
import sys
from pathlib import Path

import torch

from bench import gpu_report, gpu_sections, sections
from bench.cases import Case
from bench.sections import Budget, Section
from opsd_kernels import launch, tune

ROOT = Path(__file__).parents[2]


def begin(path, deadline=1e11):
    sections.save(path, {"deadline": deadline, "sections": {}, "rows": []})


def good(budget):
    yield {"n": 1, "ok": True}
    yield {"n": 2, "ok": False}


def broken(budget):
    yield {"n": 3}
    raise RuntimeError("no such kernel")


def test_a_section_that_raises_keeps_its_rows_and_the_rest_goes_on(tmp_path):
    path = tmp_path / "r.json"
    begin(path)
    said = []
    code = sections.run([Section("a", 5, broken), Section("b", 5, good)], path, lambda: True, said.append)
    contents = sections.read(path)
    assert code == 0
    assert contents["sections"]["a"]["rows"] == [{"n": 3}]
    assert "RuntimeError: no such kernel" in contents["sections"]["a"]["error"]
    assert contents["sections"]["b"]["error"] is None
    assert sections.failures(contents) == ["a: RuntimeError: no such kernel", "b: {'n': 2, 'ok': False}"]
    assert {"n": 1, "ok": True} in said


def test_budgets_shrink_to_what_is_left(tmp_path):
    path = tmp_path / "r.json"
    begin(path, deadline=100)
    now = itertools.count(start=0, step=20)  # every look at the clock takes 20 s
    budgets = []

    def look(budget):
        budgets.append(budget.deadline)
        yield {}

    order = [Section(name, 50, look) for name in "abcd"]
    sections.run(order, path, lambda: True, lambda row: None, clock=lambda: next(now))
    assert budgets == [50, 90, 100]  # begun at 0, 40, 80
    assert sections.read(path)["sections"]["d"]["error"] == "no time left"
    assert Budget(30, lambda: 10).left == 20


def test_a_device_that_is_lost_asks_for_another_process(tmp_path):
    path = tmp_path / "r.json"
    begin(path)
    order = [Section("a", 5, good), Section("b", 5, good)]
    assert sections.run(order, path, lambda: False, lambda row: None) == sections.RESTART
    assert set(sections.read(path)["sections"]) == {"a"}
    assert sections.run(order, path, lambda: True, lambda row: None) == 0
    assert set(sections.read(path)["sections"]) == {"a", "b"}


CHILD = """
import os, sys, time
from pathlib import Path
from bench import sections
from bench.sections import Section

def killed(budget):
    yield {"n": 1}
    os._exit(7)

def endless(budget):
    yield {"n": 2}
    time.sleep(60)

def fine(budget):
    yield {"n": 3}

SECTIONS = [Section("killed", 5, killed), Section("endless", 0.1, endless), Section("fine", 5, fine)]
if __name__ == "__main__":
    sys.exit(sections.run(SECTIONS, Path(sys.argv[1]), lambda: True, lambda row: None))
"""


def test_a_parent_outlives_its_children(tmp_path, monkeypatch):
    path, script = tmp_path / "r.json", tmp_path / "child.py"
    script.write_text(CHILD)
    begin(path)
    monkeypatch.setattr(sections, "GRACE", 2.0)
    started = []

    def start():
        env = {"PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
        started.append(subprocess.Popen([sys.executable, str(script), str(path)], env=env))
        return started[-1]

    order = [Section("killed", 5, good), Section("endless", 0.1, good), Section("fine", 5, good)]
    sections.supervise(order, path, start)
    found = sections.read(path)["sections"]
    assert found["killed"]["error"] == "its process ended with 7"
    assert found["killed"]["rows"] == [{"n": 1}]
    assert found["endless"]["error"] == "its process ended with -9"
    assert (found["fine"]["rows"], found["fine"]["error"]) == ([{"n": 3}], None)
    assert len(started) == 3


def test_children_that_cannot_start_end_the_report(tmp_path):
    path = tmp_path / "r.json"
    begin(path)
    sections.supervise([Section("a", 5, good)], path, lambda: subprocess.Popen([sys.executable, "-c", "exit(9)"]))
    assert sections.failures(sections.read(path)) == ["a process ended with 9 before it began a section"]


def test_what_is_asked_of_a_device():
    names = [section.name for section in gpu_report.SECTIONS]
    assert len(set(names)) == len(names)
    assert names[0] == "correctness"
    assert sum(section.seconds for section in gpu_report.SECTIONS) <= 600
    assert gpu_report.SECONDS + sections.GRACE <= 490
    for width in gpu_sections.WIDTHS:
        forms = [(case.trainable, case.shared) for case in gpu_report._cases(width)]
        assert forms == [(True, False), (False, False), (False, True)]


def test_memory_has_to_be_small_and_flat(monkeypatch):
    peaks = {1024: 600.0, 4096: 640.0, 16384: 640.0, 131072: 700.0}

    def step_bytes(case: Case):
        return peaks[case.n] * (2 if case.trainable else 1), 0.0

    monkeypatch.setattr(gpu_sections, "_step_bytes", step_bytes)
    rows = list(gpu_sections.memory(Budget(1e9, lambda: 0.0)))
    assert [r["ok"] for r in rows if r.get("tokens") == 131072] == [False, True, True]  # 1400 > 1229; 700 < 768
    assert [r["ok"] for r in rows if "check" in r] == [False, False, False]
    assert list(gpu_sections.memory(Budget(0.0, lambda: 0.0))) == []


def test_tuning_reports_the_row_and_the_step_and_puts_the_table_back(monkeypatch):
    where = launch.Where(90, 151936, "bfloat16", "jsd")
    found = tune.Found(launch.TABLE[launch.Where(80)], 2e-3, 1e-3, 9, complete=True)
    seen = []
    monkeypatch.setattr(tune, "tune", lambda vocab, gradient, name, seconds: (where, found))
    monkeypatch.setitem(gpu_sections.PROVIDERS, "triton", lambda case: lambda: seen.append(where in launch.TABLE))
    rows = list(gpu_sections.tuning("jsd")(Budget(1e9, lambda: 0.0)))
    assert rows[0]["row"] == tune.line(where, found)
    assert rows[1].keys() == {"tuned", "table_ms", "tuned_ms"}
    assert seen == [False] * 8 + [True] * 8
    assert where not in launch.TABLE
    assert next(gpu_sections.tuning("jsd")(Budget(0.0, lambda: 0.0)))["absent"] == "no time left"


def test_speed_shares_its_time_and_says_who_found_none(monkeypatch):
    tiny = [Case("tiny", 24, 500, 16, "jsd", torch.float32, True, "cpu", shared) for shared in (True, False)]
    monkeypatch.setattr(gpu_sections, "ROUNDS", 3)
    rows = list(gpu_sections.speed(*tiny, names=("floor", "torch rows"))(Budget(1e9, lambda: 0.0)))
    assert [(r["case"], r["provider"]) for r in rows] == [(str(c), p) for c in tiny for p in ("floor", "torch rows")]
    assert all(r["samples"] == 3 for r in rows)
    (late,) = gpu_sections.speed(tiny[0], names=("floor",))(Budget(1.0, lambda: 0.0))
    assert late["absent"] == "no time left"
