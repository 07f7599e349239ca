"""Policy gradients on a sequence reward: the hybrid term of OmniOPSD, and GRPO, which is reward alone.

    hybrid   L_R = - mean over responses of (1 / T) sum_t R(y) log pi(y_t)          raw: no baseline, ratio or clip
    GRPO     L   = - mean over responses of (1 / T) sum_t min(r_t A, clip(r_t, 1 - eps, 1 + eps) A)
             A   = (R - mean of the group) / (std of the group + 1e-4),   r_t = pi(y_t) / pi_old(y_t)

OmniOPSD: arXiv 2606.15920. GRPO: arXiv 2402.03300, without its divergence to a reference model. pi_old drew the
responses; r_t is 1 in the first update on them, and the clip works from the second one on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd.transfer import to_device

_EPS = 1e-4  # GRPO's guard for a group whose rewards are all alike: its advantages are 0


def reward_loss(
    logprobs: Tensor,  # (N,) fp32, with gradient
    rewards: Tensor,  # (responses,) fp32
    lengths: Sequence[int],
    token_weights: Tensor,  # (N,) fp32, 1 / (T_i * responses of the step)
) -> Tensor:
    """The hybrid term above; the mean over responses is inside the token weights."""
    return -(token_weights * _per_token(rewards, lengths) * logprobs).sum()


def clipped_loss(
    logprobs: Tensor,  # (N,) fp32, with gradient
    old_logprobs: Tensor,  # (N,) fp32, of the same tokens when they were drawn
    advantages: Tensor,  # (responses,) fp32
    lengths: Sequence[int],
    token_weights: Tensor,  # (N,) fp32, 1 / (T_i * responses of the step)
    clip: float,  # eps
) -> tuple[Tensor, Tensor]:
    """GRPO's loss above, and the number of tokens whose gradient the clip takes away (no gradient)."""
    ratio, per_token = (logprobs - old_logprobs).exp(), _per_token(advantages, lengths)
    free, held = ratio * per_token, ratio.clamp(1.0 - clip, 1.0 + clip) * per_token
    return -(token_weights * torch.minimum(free, held)).sum(), (held < free).sum()


def group_normalised(
    rewards: Tensor,  # (B*G,) prompt-major
    per_prompt: int,  # G
) -> Tensor:
    """(R - mean) / (std + eps) within each prompt's G responses; zeros for G = 1."""
    groups = rewards.view(-1, per_prompt)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + _EPS)).flatten()


def _per_token(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """(responses,) -> (N,): every token has its response's value."""
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return values.index_select(0, to_device(response, values.device))
