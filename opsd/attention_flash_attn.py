"""The varlen kernels of the flash_attn package (2.7 or later), where it is installed. Imported only when chosen.

Source of the interface: flash_attn/flash_attn_interface.py of flash-attn 2.7 and 2.8. Its autograd wrapper is passed
by, because it can neither take a merged log-sum-exp nor return one for less than a dropout mask.
"""

from __future__ import annotations

import torch
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward, _flash_attn_varlen_forward
from torch import Tensor

from opsd.attention_kernels import offsets
from opsd.attention_plan import Part


class FlashAttn:
    """Ragged, like `cuda_flash`: q (tokens, H, d), k and v (tokens, Hkv, d), log-sum-exps (tokens, H) fp32."""

    name, ragged = "flash_attn", True

    def lse_dtype(self, dtype: torch.dtype) -> torch.dtype:
        return torch.float32

    def forward(self, q: Tensor, k: Tensor, v: Tensor, part: Part, scale: float) -> tuple[Tensor, Tensor]:
        left, right = _window(part)
        out, lse, *_ = _flash_attn_varlen_forward(
            q, k, v, *offsets(part), dropout_p=0.0, softmax_scale=scale, causal=part.causal, window_size_left=left,
            window_size_right=right,
        )  # fmt: skip
        return out, lse.transpose(0, 1)

    def backward(
        self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, part: Part, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        left, right = _window(part)
        _flash_attn_varlen_backward(
            grad, q, k, v, out, lse.transpose(0, 1).contiguous(), dq, dk, dv, *offsets(part), dropout_p=0.0,
            softmax_scale=scale, causal=part.causal, window_size_left=left, window_size_right=right, softcap=0.0,
            alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return dq, dk, dv


def _window(part: Part) -> tuple[int, int]:
    """Keys to the left and right of the diagonal; -1 is no limit."""
    return (-1, -1) if part.window is None else (part.window - 1, 0)


FLASH_ATTN = FlashAttn()
