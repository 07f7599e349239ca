"""Who is timed: this op, the head GEMMs alone, and the peers that are installed. One forward and backward each."""

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.cases import Case, operands, teacher_head
from opsd_kernels import fused_token_kl
from opsd_kernels.reference import dense_token_kl

Step = Callable[[], None]
BETA = {"forward_kl": 0.0, "jsd": 0.5, "reverse_kl": 1.0}  # the one number of TRL and Liger
OURS = ("native", "triton", "torch rows")
MAX_ERROR = {torch.float32: 1e-4, torch.bfloat16: 1e-2, torch.float16: 5e-3}  # of dX, for us
NEEDS = {"TRL": "trl", "Liger fused": "liger_kernel", "Liger chunked": "liger_kernel", "FLA": "fla"}


def _step(case: Case, loss: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Step:
    """Sum of the divergences of all tokens, differentiated."""
    student, head, teacher = operands(case)

    def step() -> None:
        student.grad = head.grad = None
        loss(student, head, teacher).backward()

    return step


def ours_loss(case: Case, backend: str) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    options: Any = {"divergence": case.divergence, "backend": backend}
    return lambda s, w, t: fused_token_kl(s, w, t, teacher_head(case), **options).sum()


def ours(backend: str) -> Callable[[Case], Step]:
    return lambda case: _step(case, ours_loss(case, backend))


def eager(case: Case) -> Step:
    return _step(case, lambda s, w, t: dense_token_kl(s, w, t, None, case.divergence).sum())


def compiled(case: Case) -> Step:
    divergence = case.divergence
    loss = torch.compile(lambda s, w, t: dense_token_kl(s, w, t, None, divergence).sum(), dynamic=False)
    return _step(case, loss)


def trl(case: Case) -> Step:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    beta = BETA[case.kind]
    return _step(case, lambda s, w, t: ChunkedDivergenceFunction.apply(s, w, None, t, w.detach(), None, beta)[0].sum())


def liger_fused(case: Case) -> Step:
    from liger_kernel.transformers import LigerFusedLinearJSD

    module = LigerFusedLinearJSD(jsd_beta=BETA[case.kind], accum_dtype=torch.float32)
    return _step(case, lambda s, w, t: module(s, w, t, w.detach(), None) * case.n)  # it takes the mean


def liger_chunked(case: Case) -> Step:
    from liger_kernel.chunked_loss.jsd_loss import LigerFusedLinearJSDLoss

    labels = torch.zeros(case.n, dtype=torch.long, device=case.device)
    module = LigerFusedLinearJSDLoss(0.0, 1.0, beta=BETA[case.kind], compiled=case.device == "cuda")
    return _step(case, lambda s, w, t: module(s, w, t, w.detach(), labels) * case.n)


def fla(case: Case) -> Step:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return _step(case, lambda s, w, t: fused_kl_div_loss(s, t, w, w.detach()) * case.n)


def floor(case: Case) -> Step:
    """The head GEMMs in the dtype of the inputs: both logits, dX, and dW where the head is trained."""
    student, head, teacher = (t.detach() for t in operands(case))
    rows = min(case.n, 2048)  # of logits at once: a floor that needs all of them in memory is none
    z = torch.empty(rows, case.vocab, dtype=case.dtype, device=case.device)
    d_student, d_head = torch.empty_like(student), torch.zeros_like(head) if case.trainable else None

    def step() -> None:
        for start in range(0, case.n, rows):
            s, t = student[start : start + rows], teacher[start : start + rows]
            out = z[: len(s)]
            torch.mm(t, head.mT, out=out)
            torch.mm(s, head.mT, out=out)
            torch.mm(out, head, out=d_student[start : start + rows])
            if d_head is not None:
                d_head.addmm_(out.mT, s, beta=0.0 if start == 0 else 1.0)

    return step


PROVIDERS: dict[str, Callable[[Case], Step]] = {
    "floor": floor,
    "native": ours("native"),
    "triton": ours("triton"),
    "torch rows": ours("torch"),
    "eager": eager,
    "torch.compile": compiled,
    "TRL": trl,
    "Liger fused": liger_fused,
    "Liger chunked": liger_chunked,
    "FLA": fla,
}


def max_error(name: str, case: Case) -> float:
    """Relative error of dX that still counts as correct.

    fp32 formulas that do not centre the logits lose three digits at small divergences, and most peers round the
    logits of half inputs, which is what their column of errors shows; a peer is held to its fp32 result only. With two
    heads the fp32 logits of both sides are rounded on their own, which the smallest divergences show.
    """
    if name in OURS:
        return MAX_ERROR[case.dtype] * (1 if case.shared else 5)
    return 5e-3 if case.dtype == torch.float32 else float("inf")


def absent(name: str, case: Case) -> str:
    """Why a provider cannot run this case here, or ""."""
    package, cuda = NEEDS.get(name), case.device == "cuda"
    if package and importlib.util.find_spec(package) is None:
        return f"{package} is not installed"
    if name in ("Liger fused", "FLA", "triton") and not cuda:
        return "its kernels need CUDA"
    if name == "native" and cuda:
        return "it runs on CPU tensors"
    if name == "FLA" and case.kind != "forward_kl":
        return "it has forward KL only"
    return ""
