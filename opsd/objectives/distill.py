"""On-policy self-distillation: a dense divergence between teacher and student on the student's own tokens.

    D_t = JSD_b(P_T(. | c_T, y_<t) || P_S(. | c_S, y_<t))          full vocabulary, b = 0.5, tau = 1
    L   = mean over responses of (1 / T) sum_t D_t  +  alpha L_R   OmniOPSD, arXiv 2606.15920

L_R is `opsd.objectives.reward` with the raw reward: no baseline, no normalisation.
"""

from __future__ import annotations

from torch import Tensor

from opsd.config import ObjectiveConfig
from opsd_kernels import Divergence, Head, TokenStats, fused_token_kl


def distill_loss(
    student_hidden: Tensor,  # (N, D)
    student_head: Head | Tensor,  # weight (V, D)
    teacher_hidden: Tensor,  # (N, E), no gradient
    teacher_head: Head | Tensor | None,  # weight (V, E); None where it is the student's own
    token_weights: Tensor,  # (N,) fp32, 1 / (T_i * responses of the step)
    config: ObjectiveConfig,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The divergence term, summed with the token weights, and what the metrics tell of each token, (N,) fp32 each:
    divergence and entropies (nats), top1_agreement (1 where both sides' likeliest token is the same)."""
    weighted, stats = token_divergence(
        student_hidden, student_head, teacher_hidden, teacher_head, config, token_weights
    )
    tokens = {
        "divergence": weighted.detach() / token_weights,
        "student_entropy": stats.student_entropy,
        "teacher_entropy": stats.teacher_entropy,
        "top1_agreement": stats.top1_agreement,
    }
    return weighted.sum(), tokens


def token_divergence(
    student_hidden: Tensor,  # (N, D)
    student_head: Head | Tensor,  # weight (V, D)
    teacher_hidden: Tensor,  # (N, E), no gradient
    teacher_head: Head | Tensor | None,  # weight (V, E); None where it is the student's own
    config: ObjectiveConfig,
    token_weights: Tensor | None = None,  # (N,) fp32
    tokens: Tensor | None = None,  # (N,) int64, for the log-probabilities of the statistics
) -> tuple[Tensor, TokenStats]:  # (N,) fp32 each
    """The config's divergence of every token, weighted, and the by-products of the same pass."""
    return fused_token_kl(
        student_hidden,
        Head.of(student_head).to(student_hidden.dtype),
        teacher_hidden,
        None if teacher_head is None else Head.of(teacher_head).to(teacher_hidden.dtype),
        divergence=Divergence(config.divergence, beta=config.beta, temperature=config.temperature),
        token_weights=token_weights,
        tokens=tokens,
        workspace_mib=config.workspace_mib,
        backend=config.backend,
        return_stats=True,
    )
