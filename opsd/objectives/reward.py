"""Policy gradient on a sequence reward: the hybrid term of OmniOPSD, and the reward-only ablation.

    L_R = - mean over responses of (1 / T) sum_t A(y) log pi(y_t)

Hybrid term: A = R, raw (arXiv 2606.15920). Reward-only (GRPO): A = (R - mean of the group) / (std of the group +
eps); with one update per rollout the importance ratio is 1, so no clip is ever active.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd.transfer import to_device

_EPS = 1e-4  # GRPO's guard for a group whose rewards are all alike: its advantages are 0


def reward_loss(
    logprobs: Tensor,  # (N,) fp32, with gradient
    advantages: Tensor,  # (responses,) fp32
    lengths: Sequence[int],
    token_weights: Tensor,  # (N,) fp32, 1 / (T_i * responses of the step)
) -> Tensor:
    """The loss above; the mean over responses is inside the token weights."""
    response = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))  # of each token
    per_token = advantages.index_select(0, to_device(response, advantages.device))
    return -(token_weights * per_token * logprobs).sum()


def group_normalised(
    rewards: Tensor,  # (B*G,) prompt-major
    per_prompt: int,  # G
) -> Tensor:
    """(R - mean) / (std + eps) within each prompt's G responses; zeros for G = 1."""
    groups = rewards.view(-1, per_prompt)
    centred = groups - groups.mean(1, keepdim=True)
    return (centred / (groups.std(1, correction=0, keepdim=True) + _EPS)).flatten()
