"""What fused_token_kl accepts, said in one place. Raises ValueError("expected X, got Y")."""

import math

import torch
from torch import Tensor

from opsd_kernels.divergence import Divergence
from opsd_kernels.heads import Head
from opsd_kernels.scalars import LEAST, MOST, is_number

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def check_operands(
    student_hidden: Tensor,
    head: Head,
    teacher_hidden: Tensor,
    teacher_head: Head,
    token_weights: Tensor | None,
    tokens: Tensor | None,
) -> None:
    _check_matrix("student_hidden", student_hidden)
    device = student_hidden.device
    _check_head("head", head)
    _check_device("head", head.weight, student_hidden=device)
    _check_matrix("teacher_hidden", teacher_hidden)
    effective = "head" if teacher_head is head else "teacher_head"
    _check_head(effective, teacher_head)
    _check_device("teacher_hidden", teacher_hidden, student_hidden=device, teacher_head=teacher_head.weight.device)
    _check_pair("student_hidden", student_hidden, "head", head.weight)
    _check_pair("teacher_hidden", teacher_hidden, effective, teacher_head.weight)
    n = student_hidden.shape[0]
    if teacher_hidden.shape[0] != n:
        raise ValueError(
            f"expected one teacher_hidden row per student_hidden row, got {teacher_hidden.shape[0]} and {n}"
        )
    _check_vocabularies(head.view(), teacher_head.view())
    if token_weights is not None:
        _check_weights(token_weights, student_hidden)
    if tokens is not None:
        _check_tokens(tokens, student_hidden)


def check_divergence(divergence: Divergence, head: Head, teacher_head: Head) -> None:
    """What it asks of the heads."""
    support, vocab = divergence.support, head.view().weight.shape[0]
    if support is not None and head.shard is not None:
        raise ValueError(f"expected a divergence over the whole vocabulary for a head in slices, got {support}")
    if support is not None and support.k > vocab:
        raise ValueError(f"expected k of {support} within the vocabulary, {vocab}, got {support.k}")
    for side, one, temperature in zip(("", "teacher_"), (head, teacher_head), divergence.temperatures, strict=True):
        found = temperature / one.factor
        if not LEAST <= found <= MOST:
            raise ValueError(
                f"expected {side}temperature / scale of {side}head from {LEAST:g} to {MOST:g}, got {found:g}"
            )


def _check_head(name: str, head: Head) -> None:
    _check_matrix(name, head.weight)
    rows, device = head.weight.shape[0], head.weight.device
    if head.weight.numel() == 0:
        raise ValueError(f"expected a head with at least one row and column, got {tuple(head.weight.shape)}")
    vocab = rows
    if head.shard is not None:
        shard = head.shard.with_sizes(rows)
        vocab = sum(shard.known_sizes)
        if shard.rows != rows:
            raise ValueError(f"expected {shard.rows} rows of {name} on this rank, as in {shard.sizes}, got {rows}")
    if head.valid_vocab is not None and not 0 < head.valid_vocab <= vocab:
        raise ValueError(f"expected 0 < valid_vocab <= {vocab}, the rows of {name}, got {head.valid_vocab}")
    if head.bias is not None:
        _check_bias(f"the bias of {name}", head.bias, rows, device)


def _check_bias(name: str, bias: Tensor, rows: int, device: torch.device) -> None:
    check_tensor(name, bias)
    if tuple(bias.shape) != (rows,) or bias.dtype not in DTYPES or bias.device != device:
        raise ValueError(
            f"expected {name} of shape ({rows},), floating-point and on {device}, "
            f"got {tuple(bias.shape)} in {bias.dtype} on {bias.device}"
        )


def _check_vocabularies(head: Head, teacher_head: Head) -> None:
    vocab, found = head.weight.shape[0], teacher_head.weight.shape[0]
    if teacher_head.shard != head.shard:
        raise ValueError(f"expected teacher_head in the slices of head, {head.shard}, got {teacher_head.shard}")
    if found != vocab:
        raise ValueError(f"expected teacher_head with the vocabulary of head, {vocab}, got {found}")


def check_tensor(name: str, x: object) -> None:
    if not isinstance(x, Tensor):
        raise ValueError(f"expected {name} as a tensor, got {type(x).__name__}")


def _check_matrix(name: str, tensor: Tensor) -> None:
    check_tensor(name, tensor)
    if hasattr(tensor, "full_tensor") or hasattr(tensor, "ds_id"):
        _check_gathered(name, tensor)
    if tensor.dim() != 2:
        raise ValueError(f"expected {name} with 2 dimensions, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"expected {name} in float32, float16 or bfloat16, got {tensor.dtype}")


def _check_gathered(name: str, tensor: Tensor) -> None:
    """A DTensor, or a parameter that DeepSpeed has partitioned."""
    if hasattr(tensor, "full_tensor") or tensor.numel() == 0:
        raise ValueError(f"expected {name} as a whole tensor (gather.full_head makes it one), got a shard of it")


def _check_device(name: str, tensor: Tensor, **places: torch.device) -> None:
    if tensor.device not in places.values():
        devices = dict.fromkeys(str(place) for place in places.values())
        expected = f"{' or '.join(places)}, {' or '.join(devices)}"
        raise ValueError(f"expected {name} on the device of {expected}, got {tensor.device}")


def _check_pair(hidden_name: str, hidden: Tensor, head_name: str, head: Tensor) -> None:
    if hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"expected {hidden_name} as wide as {head_name}, {head.shape[1]} columns, got {hidden.shape[1]}"
        )
    if hidden.dtype != head.dtype:
        raise ValueError(f"expected {hidden_name} in the dtype of {head_name}, {head.dtype}, got {hidden.dtype}")


def _check_weights(weights: Tensor, student_hidden: Tensor) -> None:
    check_tensor("token_weights", weights)
    n = student_hidden.shape[0]
    if tuple(weights.shape) != (n,):
        raise ValueError(f"expected token_weights of shape ({n},), got {tuple(weights.shape)}")
    if not weights.is_floating_point() and weights.dtype != torch.bool:
        raise ValueError(f"expected floating-point token_weights or a bool mask, got {weights.dtype}")
    if weights.device != student_hidden.device:
        raise ValueError(f"expected token_weights on {student_hidden.device}, got {weights.device}")
    if weights.requires_grad:
        raise ValueError("expected token_weights without requires_grad (they are constants), got a tensor with it")


def _check_tokens(tokens: Tensor, student_hidden: Tensor) -> None:
    check_tensor("tokens", tokens)
    n = student_hidden.shape[0]
    if tuple(tokens.shape) != (n,) or tokens.dtype != torch.int64:
        raise ValueError(f"expected tokens of shape ({n},) in int64, got {tuple(tokens.shape)} in {tokens.dtype}")
    if tokens.device != student_hidden.device:
        raise ValueError(f"expected tokens on {student_hidden.device}, got {tokens.device}")


def check_workspace(mib: float) -> None:
    if not is_number(mib) or not 0 < mib < math.inf:
        raise ValueError(f"expected a positive, finite workspace_mib, got {mib!r}")


def check_finite_rows(**hidden: Tensor) -> None:
    """Waits for the device."""
    for name, tensor in hidden.items():
        bad = (~tensor.isfinite().all(dim=1)).nonzero()[:, 0].tolist()
        if bad:
            some = ", ".join(map(str, bad[:5])) + (", ..." if len(bad) > 5 else "")
            raise ValueError(f"expected finite {name}, got NaN or infinity in {len(bad)} of its rows: {some}")
