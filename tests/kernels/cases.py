"""Inputs, errors against fp64, and the rule that a kernel has to satisfy. Shared by the tests of this folder."""

import functools
import os

import torch

from bench.mixture import DIVERGENCES, Inputs, Results, dense, differentiate, errors, fused, workspace_for
from opsd_kernels import Divergence

__all__ = ["DIVERGENCES", "Inputs", "dense", "differentiate", "errors", "fused", "workspace_for"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # set by test_triton.py for a process of its own
if INTERPRETED:
    from triton.runtime.interpreter import InterpretedFunction

    _call, _patched_for = InterpretedFunction.__call__, set()

    def _called(self, *args, **kwargs):
        """A launch patches the language of our kernels, the first call of a module of Triton's own that of this one,
        which stays patched; doing it again at every call takes most of the time."""
        module = self.fn.__module__
        if not module.startswith("opsd_kernels") and module not in _patched_for:
            _patched_for.add(module)
            return _call(self, *args, **kwargs)
        return self.rewrite()(*args, **kwargs)

    InterpretedFunction.__call__ = _called
BACKENDS = ("triton",) if INTERPRETED else ("native", "torch")
N, V, D = (2, 600, 24) if INTERPRETED else (45, 1003, 48)  # V is no multiple of 128
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


@functools.cache
def references(kind: str, dtype: torch.dtype, shared: bool) -> tuple[Inputs, Results, Results]:
    """The mixture, the fp64 truth of it, and eager torch in dtype."""
    inputs = mixture(dtype, shared)
    truth = differentiate(dense(ALL[kind]), inputs.double())
    return inputs, truth, differentiate(dense(ALL[kind]), inputs)


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
