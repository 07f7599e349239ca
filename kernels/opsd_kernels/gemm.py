"""The head-sized matrix products of one chunk, with fp32 results whatever the inputs.

fp32 inputs multiply directly. Half inputs on CUDA use a GEMM with fp32 output. Elsewhere, and for fp16 gradients
(whose range is too small for p * r), half inputs are widened to fp32 block by block of the vocabulary into a scratch
that belongs to the workspace: exact products, at fp32 GEMM speed.

On a CPU a row of the logits does not depend on the rows beside it, so that no value depends on the workspace. MKL's
kernels for AVX-512 add in one order from 16 rows on; but several threads choose by the number of rows how a width
beyond 768 is divided, so that it comes to them in parts, as exact as what they choose (bench/NOTES.md).
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import pad

LEAST_ROWS = 16
PADDED_COLUMNS = 2048  # of a product with padded rows: its temporary


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
    for rows in even_slices(head.shape[0], scratch.shape[0]):
        yield rows, scratch[: rows.stop - rows.start].copy_(head[rows])


def even_slices(size: int, most: int) -> Iterator[slice]:
    """As few slices of at most so many as there can be, of one length but for rounding."""
    count = -(-size // most)
    return (slice(i * size // count, (i + 1) * size // count) for i in range(count))


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
        _product_into(out[:, columns], wide, block)


def padding_bytes(vocab: int, device: torch.device) -> int:
    """Temporaries of logits_into for a few rows."""
    return 4 * LEAST_ROWS * min(vocab, PADDED_COLUMNS) if device.type == "cpu" else 0


def _product_into(out: Tensor, hidden: Tensor, head: Tensor) -> None:  # (n, V), (n, D), (V, D), fp32
    rows = hidden.shape[0]
    if hidden.device.type != "cpu":
        torch.mm(hidden, head.mT, out=out)
    elif rows >= LEAST_ROWS:
        _add_parts(out, hidden, head)
    else:
        hidden = pad(hidden, (0, 0, 0, LEAST_ROWS - rows))
        for columns in even_slices(head.shape[0], PADDED_COLUMNS):
            part = head[columns]
            padded = hidden.new_empty(LEAST_ROWS, part.shape[0])
            _add_parts(padded, hidden, part)
            out[:, columns] = padded[:rows]


def _add_parts(out: Tensor, hidden: Tensor, head: Tensor) -> None:
    width = hidden.shape[1]
    step = _part_of(width)
    for start in range(0, width, step):
        part = slice(start, start + step)
        out.addmm_(hidden[:, part], head[:, part].mT, beta=float(start > 0))


def _part_of(width: int) -> int:
    if width <= 768 or torch.get_num_threads() == 1:
        return width
    return 128 if width < 1536 else 384


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
