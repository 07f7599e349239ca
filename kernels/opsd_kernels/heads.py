"""A language-model head as data: what turns a hidden state into logits.

    z = softcap(scale * (hidden @ weight[:valid_vocab].T + bias[:valid_vocab])),   softcap(x) = c tanh(x / c)

Without a softcap the scale is a temperature and costs nothing. A softcap takes one pass over the logits, and one more
row of them in the workspace for its derivative 1 - (z / c)^2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from opsd_kernels import gemm


@dataclass(frozen=True)
class Head:
    """weight (V, D), bias (V,); scale multiplies logits, softcap c bounds them, rows from valid_vocab on are padding.

    Padding has no logits, no probability and a zero gradient; it is skipped by a view, the head is not copied.
    Raises ValueError for a scale or softcap that is not positive.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    valid_vocab: int | None = None

    def __post_init__(self) -> None:
        if not 0.0 < self.scale < float("inf"):
            raise ValueError(f"expected a positive, finite scale of the head, got {self.scale}")
        if self.softcap is not None and not 0.0 < self.softcap < float("inf"):
            raise ValueError(f"expected a positive, finite softcap or None, got {self.softcap}")

    @classmethod
    def of(cls, head: "Head | Tensor") -> "Head":
        if isinstance(head, cls):
            return head
        if isinstance(head, Tensor):
            return cls(head)
        raise ValueError(f"expected a head as a tensor or a Head, got {type(head).__name__}")

    def view(self) -> "Head":
        """Without padding and without a graph; the memory is the same."""
        weight = self.weight.detach()[: self.valid_vocab]
        bias = None if self.bias is None else self.bias.detach()[: self.valid_vocab]
        return Head(weight, bias, self.scale, self.softcap)

    @property
    def factor(self) -> float:
        """What is left of the scale for the temperature."""
        return self.scale if self.softcap is None else 1.0

    def equals(self, other: "Head") -> bool:
        """The same function of a hidden state, in the same memory."""
        same = (self.scale, self.softcap) == (other.scale, other.softcap)
        return same and _is_same(self.weight, other.weight) and _is_same(self.bias, other.bias)

    def finish_(self, z: Tensor, slope: Tensor | None) -> None:
        """Products (n, V) to logits in place, but for the factor; fills slope = softcap'."""
        if self.bias is not None:
            z.add_(self.bias)
        if self.softcap is not None:
            z.mul_(self.scale / self.softcap).tanh_()
            if slope is not None:
                torch.mul(z, z, out=slope).neg_().add_(1)
            z.mul_(self.softcap)

    def scratch_elements(self, budget: int) -> int:
        """fp32 elements of the widened block: none, all of it, or what the budget holds (one row at least)."""
        weight = self.weight
        return max(weight.shape[1], min(weight.numel(), budget)) if gemm.needs_widening(weight) else 0


def _is_same(a: Tensor | None, b: Tensor | None) -> bool:
    """None, the same tensor, or another view (a detached one, say) of the same memory."""
    if a is None or b is None or a is b:
        return a is b
    layouts = [(x.shape, x.stride(), x.dtype, x.device) for x in (a, b)]
    return layouts[0] == layouts[1] and a.data_ptr() == b.data_ptr()
