"""Inputs, errors against fp64, and the rule that a kernel has to satisfy. Shared by the tests of this folder."""

import functools
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import Divergence, fused_token_kl
from opsd_kernels.reference import dense_token_kl

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by test_triton.py for a process of its own
if INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    _call = InterpretedFunction.__call__

    def _called(self, *args, **kwargs):
        """The language is patched already when a kernel calls one of ours; doing it again takes most of the time."""
        ours = self.fn.__module__.startswith("opsd_kernels")
        return self.rewrite()(*args, **kwargs) if ours else _call(self, *args, **kwargs)

    InterpretedFunction.__call__ = _called
BACKENDS = ("triton",) if INTERPRETED else ("native", "torch")
N, V, D = (2, 600, 24) if INTERPRETED else (45, 1003, 48)  # V is no multiple of 128
DIVERGENCES = {
    "reverse_kl": Divergence("reverse_kl"),
    "forward_kl": Divergence("forward_kl", temperature=1.3),
    "jsd": Divergence("jsd", beta=0.3),
}
CLIPPED = {
    "clipped reverse_kl": Divergence("reverse_kl", clip=2e-3),
    "clipped forward_kl": Divergence("forward_kl", clip=2e-3),
    "clipped jsd": Divergence("jsd", beta=0.3, clip=2e-4),
}
ALL = DIVERGENCES | CLIPPED
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The rule: at most twice the error of eager torch in the same dtype, and never worse than a ceiling that keeps it
# meaningful where eager torch is meaningless (its bf16 gradients are 100 % wrong at small divergences).
CEILING = {torch.float32: 1e-3, torch.bfloat16: 1e-2, torch.float16: 2e-3}
FLOOR = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}  # the rounding of a result to its dtype

Results = dict[str, Tensor]  # value (N,), hidden (N, D), head (V, D)


@dataclass(frozen=True)
class Inputs:
    student_hidden: Tensor
    head: Tensor
    teacher_hidden: Tensor
    teacher_head: Tensor | None
    upstream: Tensor

    def double(self) -> "Inputs":
        teacher_head = None if self.teacher_head is None else self.teacher_head.double()
        return Inputs(
            *(self.student_hidden.double(), self.head.double(), self.teacher_hidden.double(), teacher_head),
            self.upstream.double(),
        )


def mixture(dtype: torch.dtype, shared: bool, n: int = N, vocab: int = V, width: int = D) -> Inputs:
    """Self-distillation: heavy-tailed logits, teachers from almost equal (KL 1e-6) to far (KL about 1)."""
    g = torch.Generator().manual_seed(7)
    head = torch.randn(vocab, width, generator=g) * torch.rand(vocab, 1, generator=g).pow(2) * 1.2
    student = torch.randn(n, width, generator=g)
    distance = torch.logspace(-2.8, -0.2, max(n, 1))[:n, None]
    teacher = student + distance * torch.randn(n, width, generator=g)
    teacher_head = None if shared else (head * (1 + 1e-2 * torch.randn(vocab, width, generator=g))).to(dtype)
    upstream = torch.rand(n, generator=g) + 0.5
    if dtype == torch.float16:
        upstream *= 1024  # a loss scale, without which the head's gradient is below the range of fp16
    return Inputs(student.to(dtype), head.to(dtype), teacher.to(dtype), teacher_head, upstream)


def differentiate(function, inputs: Inputs, trainable: bool = True) -> Results:
    """Value and gradients of function(student_hidden, head, teacher_hidden, teacher_head)."""
    student = inputs.student_hidden.clone().requires_grad_()
    head = inputs.head.clone().requires_grad_(trainable)
    value = function(student, head, inputs.teacher_hidden, inputs.teacher_head)
    (value * inputs.upstream.to(value.dtype)).sum().backward()
    results = {"value": value.detach(), "hidden": student.grad}
    return results | ({"head": head.grad} if trainable else {})


def dense(divergence: Divergence):
    return lambda s, w, t, u: dense_token_kl(s, w, t, u, divergence)


def fused(divergence: Divergence, backend: str, **options):
    return lambda s, w, t, u: fused_token_kl(s, w, t, u, divergence=divergence, backend=backend, **options)


@functools.cache
def references(kind: str, dtype: torch.dtype, shared: bool) -> tuple[Inputs, Results, Results]:
    """The mixture, the fp64 truth of it, and eager torch in dtype."""
    inputs = mixture(dtype, shared)
    truth = differentiate(dense(ALL[kind]), inputs.double())
    return inputs, truth, differentiate(dense(ALL[kind]), inputs)


def errors(found: Tensor, truth: Tensor) -> dict[str, float]:
    """Relative error, of the whole and of the median row."""
    difference, size = found.double() - truth, truth
    if truth.dim() == 1:
        difference, size = difference[:, None], truth[:, None]
    rows = difference.norm(dim=1) / size.norm(dim=1).clamp_min(1e-30)
    return {"global": (difference.norm() / size.norm()).item(), "median row": rows.median().item()}


def check(
    found: Results,
    truth: Results,
    eager: Results,
    dtype: torch.dtype,
    ceiling: float | None = None,
    signed: bool = False,  # negative values are right
) -> None:
    """Raise AssertionError for the first result that breaks the rule above."""
    ceiling = CEILING[dtype] if ceiling is None else ceiling
    for name, result in found.items():
        assert result.isfinite().all(), f"{name} is not finite"
        ours, theirs = errors(result, truth[name]), errors(eager[name], truth[name])
        for measure, error in ours.items():
            allowed = min(2 * theirs[measure], ceiling) + FLOOR[dtype]
            assert error <= allowed, f"{name}, {measure}: error {error:.2e}, allowed {allowed:.2e}"
    if not signed:
        assert (found["value"] >= 0).all(), "a divergence is negative"
