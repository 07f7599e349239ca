"""How far the likeliest tokens of student and teacher are the same ones: beyond the first, which top1_agreement has.

    overlap_t = |top_k(P_S(. | c_S, y_<t)) and top_k(P_T(. | c_T, y_<t))| / k          k = 16

1 where both sides think of the same k tokens, whatever they think of them; k / V by chance. Where few of the teacher's
tokens are among the student's own, a divergence on the student's trajectory has little to teach it: runs that
succeed come to share them (Rethinking On-Policy Distillation, arXiv 2604.13016).
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.logits import logits_of
from opsd_kernels import Head

K = 16
_TOKENS = 32  # of a pass: two rows of logits each


@torch.no_grad()
def topk_overlap(
    student_hidden: Tensor,  # (N, D)
    student_head: Head,  # weight (V, D)
    teacher_hidden: Tensor,  # (N, E)
    teacher_head: Head | None,  # weight (V, E); None where it is the student's own
    k: int = K,
) -> Tensor:  # (n,) fp32
    """The overlap of n <= 32 tokens of a pass, as far apart as they can be; of a smaller vocabulary k is all of it."""
    total = len(student_hidden)
    count = min(total, _TOKENS)
    chosen = torch.arange(count, device=student_hidden.device) * total // max(count, 1)
    theirs = teacher_head if teacher_head is not None else student_head
    student, teacher = (
        _likeliest(hidden.detach().index_select(0, chosen), head, k)
        for hidden, head in ((student_hidden, student_head), (teacher_hidden, theirs))
    )
    return (student[:, :, None] == teacher[:, None, :]).any(-1).float().mean(-1)


def _likeliest(hidden: Tensor, head: Head, k: int) -> Tensor:
    """(n, k) ids."""
    logits = logits_of(hidden, head)
    return logits.topk(min(k, logits.shape[1]), dim=-1, sorted=False).indices
