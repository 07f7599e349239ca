"""`python -m bench.accuracy [--out NAME.json]`: how exact `fused_token_kl` is, line by line of what is asked of it.

On students and teachers at distances that give divergences from 1e-4 to about 1, over heavy-tailed logits. Truth is the
dense definition in fp64. What is asked, of every kind, with one head and with two:

KL           of given fp32 logits, as pairs and as differences: no token off by more than 2e-7 * max(1, KL)
gradients    dX, as a whole and in its median row, and dW. bf16: at most 1.25 times the floor + 2e-4; the floor is the
             exact gradient of the logits rounded once to bf16, multiplied exactly, and the product rounded. fp32: at
             most 1.25 times the error of eager torch, values and the median row of dW too
least value  not below 0
chunks       of fewer tokens change no value by more than 1e-6, and gradients by at most 2e-3
again        the same numbers

Exits with 1 if a line does not hold.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from bench.mixture import DIVERGENCES, Inputs, Results, dense, differentiate, errors, fused, mixture, workspace_for
from opsd.environment import environment
from opsd_kernels import Divergence
from opsd_kernels.reference import token_divergence
from opsd_kernels.rows import RESULTS, RowOutputs, select_rows

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
SHAPES = {"SmolLM2-135M": (128, 49152, 576), "Qwen3-0.6B": (128, 151936, 1024)}  # tokens, vocabulary, width
NAMES = {"value": "value", "hidden": "dX", "head": "dW"}


@dataclass(frozen=True)
class Setting:
    kind: str  # one of DIVERGENCES
    dtype: str  # one of DTYPES
    shared: bool  # one head for both sides
    shape: tuple[int, int, int]
    backend: str = "auto"
    device: str = "cpu"

    def __str__(self) -> str:
        n, vocab, width = self.shape
        return f"N={n} V={vocab} D={width} {self.kind} {self.dtype}, {'one head' if self.shared else 'two heads'}"

    @property
    def divergence(self) -> Divergence:
        return DIVERGENCES[self.kind]

    @property
    def inputs(self) -> Inputs:
        return _inputs(self.dtype, self.shared, self.shape, self.device)

    def fused(self, workspace_mib: float = 512.0) -> Results:
        return differentiate(fused(self.divergence, self.backend, workspace_mib), self.inputs)

    def truth(self) -> Results:
        """In fp64; nobody's in particular."""
        return _truth(replace(self, backend="auto"))


@dataclass(frozen=True)
class Finding:
    check: str
    error: float
    allowed: float

    @property
    def ok(self) -> bool:
        return self.error <= self.allowed  # NaN is not


@functools.lru_cache(maxsize=2)
def _inputs(dtype: str, shared: bool, shape: tuple[int, int, int], device: str) -> Inputs:
    return mixture(DTYPES[dtype], shared, shape, device)


@functools.lru_cache(maxsize=1)
def _truth(setting: Setting) -> Results:
    return differentiate(dense(setting.divergence), setting.inputs.double())


def bf16_floor(setting: Setting) -> Results:
    """Nothing but the roundings that nobody can avoid."""
    wide = setting.inputs.double()
    z_s, z_t = wide.logits()
    (token_divergence(z_s.requires_grad_(), z_t, setting.divergence) * wide.upstream).sum().backward()
    assert z_s.grad is not None
    rounded = z_s.grad.bfloat16().double()
    return {"hidden": (rounded @ wide.head).bfloat16(), "head": (rounded.mT @ wide.student_hidden).bfloat16()}


def gradients(setting: Setting) -> Iterator[Finding]:
    """dX and dW, in fp32 values too, beside what can be had; and the least value."""
    found, truth, is_bf16 = setting.fused(), setting.truth(), setting.dtype == "bf16"
    reached = bf16_floor(setting) if is_bf16 else differentiate(dense(setting.divergence), setting.inputs)
    for name, other in reached.items():
        ours, theirs = errors(found[name], truth[name]), errors(other, truth[name])
        for part in ("whole",) if is_bf16 and name == "head" else ours:
            label = NAMES[name] if part == "whole" else f"{NAMES[name]}, {part}"
            yield Finding(label, ours[part], 1.25 * theirs[part] + (2e-4 if is_bf16 else 0.0))
    yield Finding("least value, below 0 by", found["value"].min().neg().clamp(min=0).item(), 0.0)


def given_logits(setting: Setting) -> Iterator[Finding]:
    """The largest error of a token's value by max(1, value), of fp32 logits as pairs and as differences."""
    z_s, z_t = (x.float() for x in setting.inputs.logits())
    ones = torch.ones(len(z_s), device=z_s.device)
    rows = select_rows(setting.backend, z_s.device)
    for is_delta in (False, True):
        second = z_s - z_t if is_delta else z_t
        exact = z_s.double() - second.double() if is_delta else z_t.double()
        truth = token_divergence(z_s.double(), exact, setting.divergence)
        out = RowOutputs(torch.full((len(RESULTS), len(z_s)), torch.nan, device=z_s.device))
        rows.run(z_s.clone(), second.clone(), is_delta, setting.divergence, ones, None, out, None)
        off = (out["value"].double() - truth).abs() / truth.clamp(min=1)
        yield Finding(f"KL of {'differences' if is_delta else 'pairs'} of logits", off.max().item(), 2e-7)


def chunks(setting: Setting) -> Iterator[Finding]:
    """What chunks of a third and of a thirteenth of the tokens change."""
    whole, changes = setting.fused(), []
    for parts in (3, 13):
        found = setting.fused(workspace_for(setting.inputs, setting.backend, setting.shape[0] // parts))
        value = (found["value"] - whole["value"]).abs().max().item()
        changes.append([value, *(errors(found[name], whole[name].double())["whole"] for name in ("hidden", "head"))])
    value, hidden, head = torch.tensor(changes, dtype=torch.float64).amax(0).tolist()  # NaN where one is, unlike max()
    yield Finding("chunks, value", value, 1e-6)
    yield Finding("chunks, dX", hidden, 2e-3)
    yield Finding("chunks, dW", head, 2e-3)


def again(setting: Setting) -> Iterator[Finding]:
    first, second = setting.fused(), setting.fused()
    yield Finding("again, other numbers", sum((first[name] != second[name]).sum().item() for name in first), 0.0)


def findings(setting: Setting) -> Iterator[Finding]:
    for check in (given_logits, gradients, chunks, again):
        yield from check(setting)


def settings(shape: tuple[int, int, int], backend: str, device: str) -> Iterator[Setting]:
    for dtype in DTYPES:
        for kind in DIVERGENCES:
            for shared in (True, False):
                yield Setting(kind, dtype, shared, shape, backend, device)


def section() -> Iterator[dict[str, Any]]:
    """The lines for a CUDA device, as checks of bench.gpu_report."""
    try:
        for setting in settings(SHAPES["SmolLM2-135M"], "auto", "cuda"):
            for found in findings(setting):
                row = asdict(found)
                yield {"check": f"{row.pop('check')}, {setting}", **row, "ok": found.ok}
    finally:  # the sections after it have the device to themselves
        _inputs.cache_clear()
        _truth.cache_clear()


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m bench.accuracy", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--shapes", nargs="*", default=list(SHAPES), choices=list(SHAPES), metavar="NAME")
    made.add_argument("--backend", default="auto", help="of fused_token_kl")
    made.add_argument("--device", default="cpu")
    made.add_argument("--out", type=Path, metavar="NAME.json")
    args = made.parse_args(argv)
    rows: list[dict[str, Any]] = []
    for setting in (one for name in args.shapes for one in settings(SHAPES[name], args.backend, args.device)):
        values = setting.truth()["value"]
        print(f"{setting}: values {values.min():.1e} to {values.max():.1e}, median {values.median():.1e}", flush=True)
        for found in findings(setting):
            verdict = "ok" if found.ok else "FAILS"
            print(f"  {verdict:5s} {found.check:27s} {found.error:.1e}, allowed {found.allowed:.1e}", flush=True)
            rows.append({"setting": str(setting), **asdict(found), "ok": found.ok})
    hold = sum(row["ok"] for row in rows)
    print(f"{hold} of {len(rows)} hold")
    if args.out is not None:
        args.out.write_text(json.dumps({"about": environment(), "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return 0 if hold == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
