"""What is timed: shapes, their operands, and the fp64 gradient that every provider has to reproduce first."""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import Divergence
from opsd_kernels.reference import dense_token_kl


@dataclass(frozen=True)
class Case:
    name: str
    n: int
    vocab: int
    width: int
    kind: str
    dtype: torch.dtype
    trainable: bool
    device: str = "cpu"
    shared: bool = True  # False: the teacher's head is a copy, in memory of its own

    def __str__(self) -> str:
        head = ("trainable" if self.trainable else "frozen") + ("" if self.shared else ", two heads")
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name} N={self.n} V={self.vocab} D={self.width} {self.kind} {dtype} {head}"

    @property
    def divergence(self) -> Divergence:
        return Divergence(self.kind)


SHAPES = {"S1": (1024, 32000, 576), "S2": (512, 49152, 576), "S3": (512, 151936, 1024)}  # (N, V, D)


def case(name: str, kind: str, dtype: torch.dtype, trainable: bool, slices: int = 1) -> Case:
    """A whole shape, or one of so many slices of its tokens."""
    n, vocab, width = SHAPES[name]
    return Case(name if slices == 1 else f"{name}/{slices}", n // slices, vocab, width, kind, dtype, trainable)


CASES = [  # done in minutes on two cores
    case("S1", "jsd", torch.float32, trainable=False, slices=8),
    case("S2", "jsd", torch.float32, trainable=False, slices=4),
    case("S2", "jsd", torch.float32, trainable=True, slices=4),
    case("S2", "reverse_kl", torch.float32, trainable=True, slices=4),
    case("S2", "jsd", torch.bfloat16, trainable=False, slices=4),
]
FULL_CASES = [
    case(name, kind, dtype, trainable)
    for name in SHAPES
    for dtype in (torch.float32, torch.bfloat16)
    for kind in ("jsd", "reverse_kl")
    for trainable in (False, True)
]


@functools.lru_cache(maxsize=1)
def operands(case: Case) -> tuple[Tensor, Tensor, Tensor]:
    """Student hidden, head, teacher hidden: a shared head and a teacher at distances from 1e-3 to 1."""
    g = torch.Generator(case.device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g, device=case.device)

    head = normal(case.vocab, case.width).mul_(2 / case.width**0.5)
    student = normal(case.n, case.width)
    distance = torch.logspace(-3, 0, case.n, device=case.device)[:, None]
    teacher = student + distance * normal(case.n, case.width)
    return (
        student.to(case.dtype).requires_grad_(),
        head.to(case.dtype).requires_grad_(case.trainable),
        teacher.to(case.dtype),
    )


@functools.lru_cache(maxsize=1)
def teacher_head(case: Case) -> Tensor | None:
    return None if case.shared else operands(case)[1].detach().clone()


@functools.lru_cache(maxsize=1)
def true_gradient(case: Case) -> tuple[slice, Tensor]:
    """dX of 16 rows in fp64, which is dear at full size."""
    rows = slice(0, case.n, max(1, case.n // 16))
    student, head, teacher = (t.detach() for t in operands(case))
    some = student[rows].double().requires_grad_()
    dense_token_kl(some, head.double(), teacher[rows].double(), None, case.divergence).sum().backward()
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
