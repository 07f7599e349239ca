"""Forward and backward of fused_token_kl against eager torch and the head GEMMs alone. Columns: bench/README.md."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from opsd_kernels import Divergence, fused_token_kl
from opsd_kernels.reference import dense_token_kl

ROUNDS = 4
ONCE = {"torch rows"}  # the fallback is many times slower than everything else: one round tells it
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2}  # relative error of dX that still counts as correct


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    vocab: int
    width: int
    kind: str
    dtype: torch.dtype
    trainable: bool

    def __str__(self) -> str:
        head = "trainable" if self.trainable else "frozen"
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} N={self.n} V={self.vocab} D={self.width} {self.kind} {dtype} {head}"


# S2 is (512, 49152, 576); these are slices of it that finish in minutes on two cores
CASES = [
    Case("S2/2", 256, 49152, 576, "jsd", torch.float32, trainable=False),
    Case("S2/4", 128, 49152, 576, "jsd", torch.float32, trainable=True),
    Case("S2/4", 128, 49152, 576, "reverse_kl", torch.float32, trainable=True),
    Case("S2/4", 128, 49152, 576, "jsd", torch.bfloat16, trainable=False),
]


@functools.lru_cache(maxsize=1)
def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Student hidden, head, teacher hidden: a shared head and a teacher at distances from 1e-3 to 1."""
    g = torch.Generator().manual_seed(0)
    head = torch.randn(case.vocab, case.width, generator=g).mul_(2 / case.width**0.5)
    student = torch.randn(case.n, case.width, generator=g)
    distance = torch.logspace(-3, 0, case.n)[:, None]
    teacher = student + distance * torch.randn(case.n, case.width, generator=g)
    return (
        student.to(case.dtype).requires_grad_(),
        head.to(case.dtype).requires_grad_(case.trainable),
        teacher.to(case.dtype),
    )


def fused(case: Case, backend: str) -> Callable[[], None]:
    student, head, teacher = operands(case)
    divergence = Divergence(case.kind)

    def step() -> None:
        student.grad = head.grad = None
        fused_token_kl(student, head, teacher, divergence=divergence, backend=backend).sum().backward()  # type: ignore[call-overload]

    return step


def eager(case: Case) -> Callable[[], None]:
    student, head, teacher = operands(case)

    def step() -> None:
        student.grad = head.grad = None
        dense_token_kl(student, head, teacher, None, Divergence(case.kind)).sum().backward()

    return step


def floor(case: Case) -> Callable[[], None]:
    """The head GEMMs in the dtype of the inputs: both logits, dX, and dW where the head is trained."""
    student, head, teacher = (t.detach() for t in operands(case))
    z_s, z_t = torch.empty(2, case.n, case.vocab, dtype=case.dtype).unbind()
    d_student, d_head = torch.empty_like(student), torch.empty_like(head)

    def step() -> None:
        torch.mm(student, head.mT, out=z_s)
        torch.mm(teacher, head.mT, out=z_t)
        torch.mm(z_s, head, out=d_student)
        if case.trainable:
            torch.mm(z_s.mT, student, out=d_head)

    return step


PROVIDERS: dict[str, Callable[[Case], Callable[[], None]]] = {
    "floor": floor,
    "native": lambda case: fused(case, "native"),
    "torch rows": lambda case: fused(case, "torch"),
    "eager": eager,
}


@functools.lru_cache(maxsize=1)
def true_gradient(case: Case) -> tuple[slice, Tensor]:
    """dX of some rows in fp64, which is dear at full size."""
    rows = slice(0, case.n, max(1, case.n // 16))
    student, head, teacher = (t.detach().double() for t in operands(case))
    some = student[rows].clone().requires_grad_()
    dense_token_kl(some, head, teacher[rows], None, Divergence(case.kind)).sum().backward()
    assert some.grad is not None
    return rows, some.grad


def gradient_error(case: Case) -> float:
    """Largest relative error of the sampled rows of dX, the rows of a vanishing gradient left out."""
    rows, truth = true_gradient(case)
    found = operands(case)[0].grad
    assert found is not None
    size = truth.norm(dim=1)
    error = (found[rows].double() - truth).norm(dim=1) / size.clamp_min(1e-3 * size.max())
    return error.max().item()


@pytest.mark.parametrize("provider", PROVIDERS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_forward_backward(benchmark, case: Case, provider: str) -> None:
    step = PROVIDERS[provider](case)
    step()  # warm-up, and correctness first: a fast wrong answer is not timed
    if provider != "floor":
        error = gradient_error(case)
        benchmark.extra_info["error"] = error
        assert provider == "eager" or error <= MAX_ERROR[case.dtype], f"dX is off by {error:.1e}"
    benchmark.group = str(case)
    benchmark.extra_info.update(case=str(case), provider=provider, tokens=case.n, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=1 if provider in ONCE else ROUNDS)
