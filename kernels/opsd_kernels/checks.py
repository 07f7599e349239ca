"""What fused_token_kl accepts, said in one place. Raises ValueError("expected X, got Y")."""

import torch
from torch import Tensor

from opsd_kernels.heads import Head

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(
    student_hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    token_weights: Tensor | None,
    tokens: Tensor | None,
) -> None:
    device = student_hidden.device
    _check_matrix("student_hidden", student_hidden, device)
    _check_head("head", head, device)
    _check_matrix("teacher_hidden", teacher_hidden, device)
    effective = "head" if teacher_head is head else "teacher_head"
    _check_head(effective, teacher_head, device)
    _check_pair("student_hidden", student_hidden, "head", head.weight)
    _check_pair("teacher_hidden", teacher_hidden, effective, teacher_head.weight)
    n = student_hidden.shape[0]
    if teacher_hidden.shape[0] != n:
        raise ValueError(
            f"expected one teacher_hidden row per student_hidden row, got {teacher_hidden.shape[0]} and {n}"
        )
    vocab, found = head.view().weight.shape[0], teacher_head.view().weight.shape[0]
    if found != vocab:
        raise ValueError(f"expected teacher_head with the vocabulary of head, {vocab}, got {found}")
    if token_weights is not None:
        _check_weights(token_weights, student_hidden)
    if tokens is not None:
        _check_tokens(tokens, student_hidden)


def _check_head(name: str, head: Head, device: torch.device) -> None:
    _check_matrix(name, head.weight, device)
    vocab = head.weight.shape[0]
    if head.weight.numel() == 0:
        raise ValueError(f"expected a head with at least one row and column, got {tuple(head.weight.shape)}")
    if head.valid_vocab is not None and not 0 < head.valid_vocab <= vocab:
        raise ValueError(f"expected 0 < valid_vocab <= {vocab}, the rows of {name}, got {head.valid_vocab}")
    bias = head.bias
    if bias is not None and (tuple(bias.shape) != (vocab,) or bias.dtype not in DTYPES or bias.device != device):
        raise ValueError(
            f"expected the bias of {name} of shape ({vocab},), floating-point and on {device}, "
            f"got {tuple(bias.shape)} in {bias.dtype} on {bias.device}"
        )


def _check_matrix(name: str, tensor: Tensor, device: torch.device) -> None:
    if tensor.dim() != 2:
        raise ValueError(f"expected {name} with 2 dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"expected {name} in float32, float16 or bfloat16, got {tensor.dtype}")
    if tensor.device != device:
        raise ValueError(f"expected {name} on the device of student_hidden, {device}, got {tensor.device}")


def _check_pair(hidden_name: str, hidden: Tensor, head_name: str, head: Tensor) -> None:
    if hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"expected {hidden_name} as wide as {head_name}, {head.shape[1]} columns, got {hidden.shape[1]}"
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"expected {hidden_name} in the dtype of {head_name}, {head.dtype}, got {hidden.dtype}")


def _check_weights(weights: Tensor, student_hidden: Tensor) -> None:
    n = student_hidden.shape[0]
    if tuple(weights.shape) != (n,):
        raise ValueError(f"expected token_weights of shape ({n},), got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise ValueError(f"expected floating-point token_weights, got {weights.dtype}")
    if weights.device != student_hidden.device:
        raise ValueError(f"expected token_weights on {student_hidden.device}, got {weights.device}")
    if weights.requires_grad:
        raise ValueError("expected token_weights without requires_grad (they are constants), got a tensor with it")


def _check_tokens(tokens: Tensor, student_hidden: Tensor) -> None:
    n = student_hidden.shape[0]
    if tuple(tokens.shape) != (n,) or tokens.dtype != torch.int64:
        raise ValueError(f"expected tokens of shape ({n},) in int64, got {tuple(tokens.shape)} in {tokens.dtype}")
    if tokens.device != student_hidden.device:
        raise ValueError(f"expected tokens on {student_hidden.device}, got {tokens.device}")


def check_finite_rows(**hidden: Tensor) -> None:
    """Waits for the device."""
    for name, tensor in hidden.items():
        bad = (~tensor.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            some = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise ValueError(f"expected finite {name}, got NaN or infinity in {len(bad)} of its rows: {some}")
