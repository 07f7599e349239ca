"""The reports on a machine without a GPU: arithmetic, gates, files; never a number that no GPU gave."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench import gpu_checks, gpu_report, gpu_sections, providers
from bench.cases import Case, operands
from bench.cpu_table import RESULTS, draw
from bench.cpu_table import table as cpu_table
from bench.floor import DEVICES, gemm_ms, ratio, rows_ms, table
from bench.measure import peak_extra_bytes
from bench.results import from_pytest_benchmark, write
from opsd.environment import environment
from opsd_kernels import rows_native

ROOT = Path(__file__).parents[2]
OURS = "torch rows" if rows_native.obstacle() else "native"
TINY = Case("tiny", 24, 500, 16, "jsd", torch.float32, trainable=True)


def python(*args: str) -> subprocess.CompletedProcess[str]:
    env = dict(os.environ, PYTHONPATH=f"{ROOT}:{ROOT / 'kernels'}", CUDA_VISIBLE_DEVICES="")
    return subprocess.run([sys.executable, "-m", *args], env=env, capture_output=True, text=True, cwd=ROOT)


def test_floor_of_an_h100():
    h100 = DEVICES["H100"]
    assert gemm_ms(h100, 8192, 151936, 4096, trainable=True) == pytest.approx(41.2, abs=0.1)
    assert gemm_ms(h100, 8192, 151936, 4096, trainable=False) == pytest.approx(30.9, abs=0.1)
    assert rows_ms(h100, 8192, 151936, "kl") == pytest.approx(18 * 8192 * 151936 / 3.35e9)
    lines = python("bench.floor").stdout.splitlines()
    assert lines == table(8192, 151936, [1024, 2048, 2560, 4096])
    assert all(any(name in line for line in lines) for name in ("H100", "H200", "A100", "4090", "5090", "L40S", "B200"))


@pytest.mark.parametrize(
    ("kind", "trainable", "frozen"),
    [
        ("kl", [1.51, 1.26, 1.21, 1.13], [1.68, 1.34, 1.27, 1.17]),
        ("jsd", [1.74, 1.37, 1.30, 1.19], [1.99, 1.49, 1.39, 1.25]),
    ],
)
def test_roofline_is_the_one_the_kernels_were_designed_by(kind, trainable, frozen):
    """H100, N = 8192, V = 151936: two and three passes over fp32 pairs."""
    for expected, trains in ((trainable, True), (frozen, False)):
        found = [ratio(DEVICES["H100"], 8192, 151936, width, trains, kind) for width in (1024, 2048, 2560, 4096)]
        assert found == pytest.approx(expected, abs=0.0055)


def test_without_cuda_the_gpu_report_says_so_and_writes_nothing(tmp_path):
    done = python("bench.gpu_report", str(tmp_path / "gpu"))
    assert done.returncode == 2 and "no CUDA device" in done.stderr and not done.stdout
    assert not list(tmp_path.iterdir())


def test_checks_pass_and_can_fail(monkeypatch):
    monkeypatch.setattr(gpu_checks, "SHAPE", (77, 1003, 64))
    rows = list(gpu_checks.correctness("cpu"))
    assert len(rows) == 3 * 3 * 3 * 2
    assert all(r["ok"] for r in rows)
    assert gpu_checks.repetition("cpu") == [{"check": "bitwise run to run", "ok": True}]
    real = gpu_checks.fused_token_kl
    monkeypatch.setattr(gpu_checks, "fused_token_kl", lambda *a, **k: 1.02 * real(*a, **k))
    assert not any(r["ok"] for r in gpu_checks.correctness("cpu"))


def test_a_wrong_provider_is_not_timed_and_a_broken_one_does_not_stop_the_rest(monkeypatch):
    def doubled(case):
        return providers._step(case, lambda s, w, t: 2 * providers.dense_token_kl(s, w, t, None, case.divergence).sum())

    def broken(case):
        raise RuntimeError("no such kernel\nand more")

    monkeypatch.setattr(gpu_sections, "ROUNDS", 3)
    monkeypatch.setitem(providers.PROVIDERS, "doubled", doubled)
    monkeypatch.setitem(providers.PROVIDERS, "broken", broken)
    rows = gpu_sections.measure(TINY, 5, ["floor", OURS, "eager", "FLA", "doubled", "broken"])
    found = {r["provider"]: r for r in rows}
    assert "wrong: dX is off by 1.0e+00" in found["doubled"]["absent"]
    assert found["broken"]["absent"] == "RuntimeError: no such kernel"
    assert "absent" in found["FLA"]
    assert found[OURS]["samples"] == 3 and found["floor"]["percent_of_floor"] == pytest.approx(100)
    assert any("absent: RuntimeError" in line for line in gpu_report.table(rows))


def test_floor_and_eager_do_what_they_say():
    for name in ("floor", "eager", OURS, "torch rows"):
        providers.PROVIDERS[name](TINY)()
    student, head, _ = operands(TINY)
    assert student.grad is not None and head.grad is not None


def test_peak_counts_what_is_freed_and_not_what_is_kept():
    kept = []

    def step():
        kept.append(torch.ones(1 << 18))  # 1 MiB
        torch.ones(1 << 19).sum()  # 2 MiB, gone

    assert peak_extra_bytes(step, "cpu") == pytest.approx(2 << 20, rel=0.01)


def test_results_of_pytest_benchmark_become_a_file_and_a_picture(tmp_path):
    def bench(provider, median):
        info = {"case": "c", "provider": provider, "tokens": 100, "error": 1e-3, "extra_bytes": 1 << 20}
        return {"extra_info": info, "stats": {"median": median, "rounds": 4}}

    rows = from_pytest_benchmark({"benchmarks": [bench("floor", 0.1), bench("native", 0.125), {"extra_info": {}}]})
    assert rows[1] == {
        "case": "c",
        "provider": "native",
        "ms": 125.0,
        "samples": 4,
        "tokens_per_s": 800.0,
        "percent_of_floor": 80.0,
        "extra_mib": 1.0,
        "dx_error": 1e-3,
    }
    pytest.importorskip("matplotlib")
    assert write(tmp_path / "new" / "r", {**environment(), "rows": rows}) == ""
    assert json.loads((tmp_path / "new" / "r.json").read_text())["rows"] == rows
    assert (tmp_path / "new" / "r.png").stat().st_size > 1000


def test_no_matplotlib_is_not_fatal(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert write(tmp_path / "r", {"rows": []}) == "matplotlib is not installed"
    assert (tmp_path / "r.json").exists()


def test_the_readme_has_the_table_of_the_committed_file(tmp_path: Path):
    rows = json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
    assert cpu_table(rows) in (ROOT / "README.md").read_text(encoding="utf-8")
    without = cpu_table([row for row in rows if row["provider"] != "native" or "S2" not in row["case"]])
    assert without.count("| - |") >= 4
    draw(tmp_path / "op.png", rows)
    assert (tmp_path / "op.png").stat().st_size > 10_000
