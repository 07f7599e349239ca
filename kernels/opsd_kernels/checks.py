"""What fused_token_kl accepts, said in one place. Raises ValueError("expected X, got Y")."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(
    student_hidden: Tensor,
    head: Tensor,
    teacher_hidden: Tensor,
    teacher_head: Tensor | None,
    token_weights: Tensor | None,
    tokens: Tensor | None,
) -> None:
    tensors = {"student_hidden": student_hidden, "head": head, "teacher_hidden": teacher_hidden}
    if teacher_head is not None:
        tensors["teacher_head"] = teacher_head
    for name, tensor in tensors.items():
        _check_matrix(name, tensor, student_hidden.device)
    effective = "head" if teacher_head is None else "teacher_head"
    _check_pair("student_hidden", student_hidden, "head", head)
    _check_pair("teacher_hidden", teacher_hidden, effective, tensors[effective])
    n, vocab = student_hidden.shape[0], head.shape[0]
    if teacher_hidden.shape[0] != n:
        raise ValueError(
            f"expected one teacher_hidden row per student_hidden row, got {teacher_hidden.shape[0]} and {n}"
        )
    if vocab == 0 or head.shape[1] == 0:
        raise ValueError(f"expected a head with at least one row and column, got {tuple(head.shape)}")
    if teacher_head is not None and teacher_head.shape[0] != vocab:
        raise ValueError(f"expected teacher_head with the vocabulary of head, {vocab}, got {teacher_head.shape[0]}")
    if token_weights is not None:
        _check_weights(token_weights, student_hidden)
    if tokens is not None:
        _check_tokens(tokens, student_hidden)


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
