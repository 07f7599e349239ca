"""What a CUDA machine has to show before anything is timed: exactness, no host sync, capture, repetition."""

import itertools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, operands
from opsd_kernels import fused_token_kl
from opsd_kernels.reference import dense_token_kl

# Relative error of a result allowed beside twice that of eager torch, and the most that is allowed in any case
ROUNDING = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 4e-3}
CEILING = {torch.float32: 1e-3, torch.float16: 2e-3, torch.bfloat16: 1e-2}
KINDS = ("reverse_kl", "forward_kl", "jsd")
SCALE = 1024.0  # upstream gradient: an fp16 head gradient would underflow without a loss scale


SHAPE = (301, 5003, 256)  # tokens, vocabulary, width: multiples of nothing


def small(
    device: str, kind: str = "jsd", dtype: torch.dtype = torch.bfloat16, trainable: bool = True, shared: bool = True
) -> Case:
    return Case("check", *SHAPE, kind, dtype, trainable, device, shared)


def correctness(device: str) -> Iterator[dict[str, Any]]:
    """Value, dX and dW of every kind and dtype against fp64, with the error of eager torch beside it."""
    for dtype, kind, shared in itertools.product(ROUNDING, KINDS, (True, False)):
        case = small(device, kind, dtype, shared=shared)
        tensors = [t.detach() for t in operands(case)]
        truth = _results(case, [t.double() for t in tensors], dense=True)
        eager, ours = _results(case, tensors, dense=True), _results(case, tensors, dense=False)
        for name in truth:
            mine, theirs = _error(ours[name], truth[name]), _error(eager[name], truth[name])
            allowed = min(2 * theirs, CEILING[dtype]) + ROUNDING[dtype]
            label = f"{name} {kind} {str(dtype)[6:]}, {'one head' if shared else 'two heads'}"
            ok = mine <= allowed  # NaN is not
            yield {"check": label, "error": mine, "eager": theirs, "allowed": allowed, "ok": ok}


def _results(case: Case, tensors: list[Tensor], dense: bool) -> dict[str, Tensor]:
    student, head = (t.clone().requires_grad_() for t in tensors[:2])
    if dense:
        value = dense_token_kl(student, head, tensors[2], None, case.divergence)
    else:
        other = None if case.shared else tensors[1].clone()
        value = fused_token_kl(student, head, tensors[2], other, divergence=case.divergence)
    (SCALE * value.sum()).backward()
    assert student.grad is not None and head.grad is not None
    return {"value": value.detach(), "dX": student.grad, "dW": head.grad}


def _error(found: Tensor, truth: Tensor) -> float:
    return ((found.double() - truth).norm() / truth.norm()).item()


def _run(case: Case) -> list[Tensor]:
    """One step; value and gradients."""
    student, head, teacher = operands(case)
    student.grad = head.grad = None
    value = fused_token_kl(student, head, teacher, divergence=case.divergence)
    value.sum().backward()
    return [t for t in (value.detach(), student.grad, head.grad) if t is not None]


def repetition(device: str) -> list[dict[str, Any]]:
    """Two runs give the same bits."""
    first, second = ([t.clone() for t in _run(small(device))] for _ in range(2))
    same = all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    return [{"check": "bitwise run to run", "ok": same}]


def no_sync() -> list[dict[str, Any]]:
    """A step that makes the host wait for the device raises."""
    rows = []
    for trainable in (False, True):
        case = small("cuda", trainable=trainable)
        _run(case)  # compiles and tunes
        row: dict[str, Any] = {"check": f"no host sync, {'trainable' if trainable else 'frozen'}", "ok": True}
        torch.cuda.set_sync_debug_mode("error")
        try:
            _run(case)
        except RuntimeError as error:
            row |= {"ok": False, "found": str(error).splitlines()[0]}
        finally:
            torch.cuda.set_sync_debug_mode("default")
        rows.append(row)
    return rows


def capture() -> list[dict[str, Any]]:
    """A step in a CUDA graph, replayed on other inputs, equals the step outside of it."""
    case = small("cuda", trainable=False)
    row: dict[str, Any] = {"check": "CUDA graph", "ok": True}
    student, _, _ = operands(case)
    try:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            _run(case)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _run(case)
        with torch.no_grad():
            student.mul_(1.1)
        graph.replay()
        replayed = [t.clone() for t in captured]
        row["ok"] = all(torch.equal(a, b) for a, b in zip(replayed, _run(case), strict=True))
    except RuntimeError as error:
        row |= {"ok": False, "found": str(error).splitlines()[0]}
    operands.cache_clear()  # the inputs were changed
    return [row]
