"""A module with the constructor and the forward of liger_kernel's LigerFusedLinearJSD, on `fused_token_kl`.

    - from liger_kernel.transformers import LigerFusedLinearJSD
    + from opsd.integrations.liger import FusedLinearJSD as LigerFusedLinearJSD

Runs on CPU and CUDA, needs no liger_kernel, and never rounds logits to half precision.
"""

from __future__ import annotations

import torch
from torch import Tensor

from opsd.integrations.conventions import divergence_of
from opsd.integrations.hf import matched
from opsd_kernels import Head, fused_token_kl
from opsd_kernels.checks import check_tensor


class FusedLinearJSD(torch.nn.Module):
    """sum_n m_n JSD_n / sum_n m_n over tokens n, with m_n = 1 unless shift_labels[n] is ignore_index.

    jsd_beta: 0 is the forward KL, 1 the reverse KL, between them b KL(q||M) + (1-b) KL(p||M), M = (1-b) p + b q.
    temperature divides both logits; as in Liger, the loss is not multiplied by its square.
    accum_dtype: taken for the signature's sake: gradients of the head are always accumulated in fp32.
    With every token ignored the loss and its gradients are 0. Raises ValueError for beta or temperature out of range.
    """

    def __init__(
        self,
        jsd_beta: float = 0.5,
        ignore_index: int = -100,
        temperature: float = 1.0,
        accum_dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.divergence = divergence_of(jsd_beta, temperature)
        self.ignore_index = ignore_index

    def forward(
        self,
        student_input: Tensor,  # (N, D)
        student_weight: Tensor,  # (V, D)
        teacher_input: Tensor,  # (N, E)
        teacher_weight: Tensor,  # (V, E)
        shift_labels: Tensor | None = None,  # (N,)
    ) -> Tensor:  # scalar, fp32
        operands = matched(student_input, Head(student_weight), teacher_input, Head(teacher_weight))
        n = student_input.shape[:1].numel()
        if shift_labels is not None:
            check_tensor("shift_labels", shift_labels)
        if shift_labels is None:
            weights = torch.full((n,), 1 / max(n, 1), dtype=torch.float32, device=student_input.device)
        elif shift_labels.shape != (n,):
            raise ValueError(f"expected shift_labels of shape ({n},), got {tuple(shift_labels.shape)}")
        else:
            counted = (shift_labels != self.ignore_index).float()
            weights = counted / counted.sum().clamp(min=1)
        return fused_token_kl(*operands, divergence=self.divergence, token_weights=weights).sum()
