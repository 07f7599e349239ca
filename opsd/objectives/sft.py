"""Supervised fine-tuning on the rows' own answers: the cold start, and the SFT ablation.

L = - mean over rows of (1 / T) sum_t log pi(a_t | c, a_<t)
"""

from __future__ import annotations

from torch import Tensor


def sft_loss(
    logprobs: Tensor,  # (N,) fp32, with gradient
    token_weights: Tensor,  # (N,) fp32, 1 / (T_i * rows of the step)
) -> Tensor:
    return -(token_weights * logprobs).sum()
