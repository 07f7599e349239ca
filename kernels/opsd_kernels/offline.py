"""Compile the row kernels for an architecture without having it, and read what a program of them takes.

Triton makes a cubin on any machine, and ships cuobjdump.
"""

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from opsd_kernels.divergence import Divergence
from opsd_kernels.launch import Launch
from opsd_kernels.rows_triton import KERNELS, constants

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
TYPES = {"vocab": "i32", "inverse_t": "fp32", "furthest": "fp32", "beta": "fp32", "clip": "fp32", "tokens": "*i64"}
# Shared memory that a program may ask for, KiB: CUDA C++ programming guide, compute capabilities
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}


@dataclass(frozen=True)
class Resources:
    registers: int  # of a thread
    stack: int  # bytes of a thread; spilled registers are there
    local: int
    shared: int  # bytes of a program

    def obstacle(self, capability: int) -> str:
        """Why a launch must not be used, or ""."""
        if self.stack or self.local:
            return f"spills {self.stack + self.local} bytes"
        most = SHARED_KIB[max(family for family in SHARED_KIB if family <= capability)] << 10
        return f"{self.shared} bytes of shared memory, at most {most}" if self.shared > most else ""


def compile_for(name: str, launch: Launch, divergence: Divergence, capability: int, gradient: str = "*bf16") -> Any:
    """A kernel as run() would compile it for aligned rows; gradient is a pointer type."""
    kernel = KERNELS[name]
    fixed: dict[str, Any] = constants(name, launch, divergence, is_delta=False)
    options = {"num_warps": fixed.pop("num_warps")}
    types = TYPES | {"grad": gradient}

    def type_of(argument: str) -> str:
        if argument in fixed:
            return "constexpr"
        return "i32" if argument.endswith("stride") else types.get(argument, "*fp32")

    signature = {argument: type_of(argument) for argument in kernel.arg_names}
    aligned = [a.startswith("*") or name in ("vocab", "stride", "grad_stride") for name, a in signature.items()]
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(i,): fixed[a] for i, a in enumerate(signature) if a in fixed},
        attrs={(i,): [["tt.divisibility", 16]] for i, yes in enumerate(aligned) if yes},
    )
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled: Any) -> Resources:
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        command = [str(CUOBJDUMP), "--dump-resource-usage", str(cubin)]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack, static, local = map(int, re.findall(r"(?:REG|STACK|SHARED|LOCAL):(\d+)", usage)[:4])
    return Resources(registers, stack, local, max(static, compiled.metadata.shared))
