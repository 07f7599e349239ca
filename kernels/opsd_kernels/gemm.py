"""The head-sized matrix products of one chunk, with fp32 results whatever the inputs.

fp32 inputs multiply directly. Half inputs on CUDA use a GEMM with fp32 output. Elsewhere, and for fp16 gradients
(whose range is too small for p * r), half inputs are widened to fp32 block by block of the vocabulary into a scratch
that belongs to the workspace: exact products, at fp32 GEMM speed.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


def needs_widening(head: Tensor) -> bool:
    """Whether any product with this head goes through fp32 copies of it."""
    return head.dtype != torch.float32 and not (head.is_cuda and head.dtype == torch.bfloat16)


def gradient_dtype(head: Tensor) -> torch.dtype:
    """dtype of the gradient rows that feed the gradient GEMMs."""
    return torch.bfloat16 if head.is_cuda and head.dtype == torch.bfloat16 else torch.float32


def widened(head: Tensor, scratch: Tensor | None) -> Iterator[tuple[slice, Tensor]]:  # yields (rows of V, fp32 block)
    """The head in fp32, as it is or block by block through the scratch (blocks, D)."""
    if head.dtype == torch.float32:
        yield slice(0, head.shape[0]), head
        return
    assert scratch is not None
    for start in range(0, head.shape[0], scratch.shape[0]):
        stop = min(start + scratch.shape[0], head.shape[0])
        yield slice(start, stop), scratch[: stop - start].copy_(head[start:stop])


def logits_into(
    out: Tensor,  # (n, V) fp32
    hidden: Tensor,  # (n, D), fp32 or the dtype of head
    head: Tensor,  # (V, D)
    scratch: Tensor | None,
) -> None:
    """out = hidden @ head.T."""
    if head.is_cuda and head.dtype != torch.float32:
        torch.mm(hidden.to(head.dtype), head.mT, out_dtype=torch.float32, out=out)
        return
    wide = hidden.float()
    for columns, block in widened(head, scratch):
        torch.mm(wide, block.mT, out=out[:, columns])


def hidden_gradient(grad: Tensor, head: Tensor, scratch: Tensor | None) -> Tensor:  # (n, V), (V, D) -> (n, D)
    """grad @ head, in the dtype of grad or fp32."""
    if grad.dtype == head.dtype:
        return grad @ head
    total = torch.zeros(grad.shape[0], head.shape[1], dtype=torch.float32, device=grad.device)
    for columns, block in widened(head, scratch):
        total.addmm_(grad[:, columns], block)
    return total


def head_gradient_into(total: Tensor, grad: Tensor, hidden: Tensor, add: bool) -> None:  # (V, D), (n, V), (n, D)
    """total = grad.T @ hidden, added to what is there where `add`; in fp32."""
    if grad.dtype == torch.float32:
        total.addmm_(grad.mT, hidden.float(), beta=float(add))
    elif add:
        torch.addmm(total, grad.mT, hidden, out_dtype=torch.float32, out=total)
    else:
        torch.mm(grad.mT, hidden, out_dtype=torch.float32, out=total)
