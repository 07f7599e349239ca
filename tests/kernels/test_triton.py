"""The Triton row kernels without a GPU: run by Triton's interpreter, and compiled for every row of the launch table."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.kernels import cases

pytest.importorskip("triton", reason="Triton is published for Linux on x86-64 only")
if cases.INTERPRETED:
    pytest.skip("this is the process that the tests below start", allow_module_level=True)

HERE = Path(__file__).parent
RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def test_interpreter_passes_the_same_tests():
    """In a process of its own: the interpreter is chosen when Triton is imported."""
    files = [str(HERE / name) for name in ("test_accuracy.py", "test_rows.py", "test_op.py")]
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


def kernels(with_clips):
    """(name, kernel, kind, clips) of what run() launches; delta changes too little to be compiled twice."""
    from opsd_kernels import triton_gradient, triton_stats, triton_terms
    from opsd_kernels.divergence import KINDS

    yield "centre", triton_stats.centre_kernel, "reverse_kl", False
    yield "terms jsd", triton_terms.terms_kernel, "jsd", False
    for kind in KINDS:
        yield f"sums {kind}", triton_stats.sums_kernel, kind, False
        yield f"gradient {kind}", triton_gradient.gradient_kernel, kind, False
        if with_clips:
            yield f"clipped terms {kind}", triton_terms.terms_kernel, kind, True
            yield f"clipped gradient {kind}", triton_gradient.gradient_kernel, kind, True


def compile_for(kernel, kind, clips, capability, delta):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from opsd_kernels.divergence import KINDS, Divergence
    from opsd_kernels.launch import TABLE
    from opsd_kernels.rows_triton import gradient_tile
    from opsd_kernels.triton_stats import PARTS

    launch = TABLE[capability]
    tile = launch.tile
    if "grad" in kernel.arg_names:
        tile = gradient_tile(launch, Divergence(kind, clip=1.0 if clips else None))
    constants = {"delta": delta, "tile": tile, "splits": launch.splits, "count": PARTS}
    constants |= {"kind": KINDS.index(kind), "with_grad": True, "clips": clips}
    types = {"vocab": "i32", "stride": "i32", "grad_stride": "i32", "out_stride": "i32", "inverse_t": "fp32"}
    types |= {"beta": "fp32", "clip": "fp32", "grad": "*bf16", "tokens": "*i64"}
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "*fp32") for name in names}
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs={
            (i,): [["tt.divisibility", 16]]
            for i, name in enumerate(names)
            if signature[name].startswith("*") or "stride" in name
        },
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": launch.warps})


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_compiles_without_spilling(capability, tmp_path, record_property):
    import triton

    from opsd_kernels.launch import TABLE

    assert capability in TABLE
    cuobjdump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    for name, kernel, kind, clips in kernels(with_clips=capability in (90, 120)):  # one of each launch
        compiled = compile_for(kernel, kind, clips, capability, delta=False)
        cubin = tmp_path / f"{name}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run(
            [str(cuobjdump), "--dump-resource-usage", str(cubin)], capture_output=True, text=True, check=True
        ).stdout
        registers, stack, _, local = map(int, RESOURCES.search(usage).groups())
        record_property(name, registers)
        assert (stack, local) == (0, 0), f"{name} spills on sm_{capability}: {usage}"


def test_launch_table_is_looked_up_by_family():
    from opsd_kernels.launch import TABLE, launch_for

    assert launch_for(87) == TABLE[86]
    assert launch_for(103) == TABLE[100]
    with pytest.raises(ValueError, match=r"expected compute capability 8\.0 or newer, got 7\.5"):
        launch_for(75)


def test_importing_the_package_loads_no_triton():
    code = "import sys, opsd_kernels; sys.exit('triton' in sys.modules and 'triton imported')"
    # torch itself must not have loaded it either for this to say something
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], env=dict(os.environ, PYTHONPATH="kernels"))
    assert run.returncode == 0
