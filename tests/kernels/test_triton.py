"""The Triton row kernels without a GPU: run by Triton's interpreter, and compiled for every row of the launch table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from opsd_kernels import Divergence
from tests.kernels import cases

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 only")
if cases.INTERPRETED:
    pytest.skip("this is the process that the tests below start", allow_module_level=True)

HERE = Path(__file__).parent


def test_interpreter_passes_the_same_tests():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    names = ("accuracy", "rows", "row_edges", "moving_centre", "op", "temperatures")
    files = [str(HERE / f"test_{name}.py") for name in names]
    # a program takes a tenth of a second there: only what depends on the row kernel
    elsewhere = (
        "fp16 or bf16 or own_buffer or far or frozen or multiplies or identical_teacher or limits or nothing_reaches"
    )
    autograd = "retained or double or autocast or receives or uniform or detached or token_weights or jsd or forward_kl"
    twice = "separate or (clipped and shared) or (excludes and clipped and delta) or by_products or weight_0"
    selection = f"not ({elsewhere} or {twice}) and not (test_op and ({autograd}))"
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", selection, *files],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-2000:]
    assert re.search(r"[1-9]\d+ passed", run.stdout), run.stdout


def divergences(capability):
    """Those that a row is compiled for: clipped ones where registers are scarce, and on the reference machine."""
    from opsd_kernels.divergence import KINDS

    clips = (None, 1.0) if capability in (90, 120) else (None,)
    return [Divergence(kind, clip=clip) for kind in KINDS for clip in clips]


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_without_spilling(capability, record_property):
    from opsd_kernels.launch import TABLE, Where, label, launch_for
    from opsd_kernels.offline import compile_for, resources
    from opsd_kernels.rows_triton import names

    assert Where(capability) in TABLE
    for divergence in divergences(capability):
        divided = label(divergence.kind, divergence.clip is not None)
        launch = launch_for(capability, 151936, "bfloat16", divided)
        for name in names(divergence):
            found = resources(compile_for(name, launch, divergence, capability))
            record_property(f"{name} {divided}", found.registers)
            assert not found.obstacle(capability), f"{name} {divided} on sm_{capability}"


@pytest.mark.parametrize("name", ["statistics", "terms", "gradient"])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiled_as_the_launch_says(name):
    """With its warps, loads of 16 bytes, and offsets of rows in 64 bits."""
    from opsd_kernels.launch import launch_for
    from opsd_kernels.offline import compile_for

    launch = launch_for(90, 151936, "bfloat16", "jsd")
    compiled = compile_for(name, launch, Divergence("jsd"), 90)
    assert compiled.metadata.num_warps == getattr(launch, name).warps
    assert "ld.global.v4.b32" in compiled.asm["ptx"]
    ((row, code),) = re.findall(r"(%\w+) = tt.get_program_id x(.*)", compiled.asm["ttir"], re.DOTALL)
    uses = [line for line in code.splitlines() if re.search(rf"{row}\b", line)]
    assert uses and all("arith.extsi" in line and "i32 to i64" in line for line in uses), uses


@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_a_row_that_spills_or_asks_for_too_much_is_refused():
    from opsd_kernels.launch import Launch, Tile
    from opsd_kernels.offline import Resources, compile_for, resources

    crowded = Launch.of(Tile(8192, 4), splits=8)  # 64 columns a thread
    found = resources(compile_for("terms", crowded, Divergence("jsd", clip=1.0), 90))
    assert found.obstacle(90) == f"spills {found.stack + found.local} bytes"
    assert not Resources(128, 0, 0, 100 << 10).obstacle(90)
    assert Resources(128, 0, 0, 100 << 10).obstacle(89) == "102400 bytes of shared memory, at most 101376"


def test_launch_table_is_looked_up_by_family_and_prefers_what_is_specific(monkeypatch):
    from opsd_kernels import launch

    rows = [launch.Where(80), launch.Where(90), launch.Where(90, vocab=65536), launch.Where(90, divergence="jsd")]
    rows.append(launch.Where(90, gradient="float32", divergence="jsd"))
    monkeypatch.setattr(launch, "TABLE", {row: row for row in rows})
    look_up = launch.launch_for
    assert look_up(87, 1000, "bfloat16", "jsd") == rows[0]
    assert look_up(103, 1000, "bfloat16", "reverse_kl") == rows[1]
    assert look_up(90, 65536, "bfloat16", "reverse_kl") == rows[2]
    assert look_up(90, 65536, "bfloat16", "jsd") == rows[3]
    assert look_up(90, 1000, "float32", "jsd") == rows[4]
    assert look_up(90, 70000, "bfloat16", "clipped jsd") == rows[2]
    narrow = [launch.Where(90, gradient="float32"), launch.Where(90, vocab=131072)]  # a divergence says most, then this
    monkeypatch.setattr(launch, "TABLE", {row: row for row in rows[:4] + narrow})
    assert look_up(90, 200000, "float32", "jsd") == rows[3]
    assert look_up(90, 200000, "float32", "reverse_kl") == narrow[0]
    assert look_up(90, 200000, "bfloat16", "reverse_kl") == narrow[1]
    with pytest.raises(ValueError, match=r"expected compute capability 8\.0 or newer, got 7\.5"):
        look_up(75, 1000, "bfloat16", "jsd")


def test_importing_the_package_loads_no_triton():
    code = "import sys, opsd_kernels; sys.exit('triton' in sys.modules and 'triton imported')"
    # torch itself must not have loaded it either for this to say something
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], env=dict(os.environ, PYTHONPATH="kernels"))
    assert run.returncode == 0
