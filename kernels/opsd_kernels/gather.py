"""The whole head where a trainer keeps a shard of it on every rank: DTensors (FSDP2) and ZeRO-3 parameters.

    with full_head(model.lm_head.weight) as head:
        loss = fused_token_kl(student_hidden, head, teacher_hidden).mean()
    loss.backward()

A head in slices that stay where they are is another thing: VocabShard in heads.py.
"""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from opsd_kernels.heads import Head
from opsd_kernels.scalars import check_flag


@contextmanager
def full_head(head: Tensor | Head, *, dtype: torch.dtype | None = None, mean: bool = True) -> Iterator[Head]:
    """The head with whole weight and bias, plain tensors of `dtype` (None: their own). Every rank has to enter it.

    DTensor: gathered, differentiably. Each rank's gradient is for its own tokens; they are averaged over the mesh, as
    FSDP2 averages those of the other parameters (mean=False: summed), in the dtype of the parameter, and every rank
    keeps its shard. A cast to dtype happens before the gather, on the shard. Backward may run after the block.
    ZeRO-3 (a parameter with a ds_id): deepspeed.zero.GatheredParameters for the length of the block, after which the
    tensor is empty again. The backward of a trained head has to run inside the block; a frozen one's need not,
    since its gradients are formed in the forward.
    A plain tensor is handed on; so is a parameter that FSDP2 has gathered for the module that is running.

    Raises ValueError for what is no head, dtype or bool, and for a ZeRO-3 parameter where deepspeed cannot be imported.
    """
    head = Head.of(head)
    check_flag("mean", mean)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise ValueError(f"expected a torch.dtype or None, got {dtype!r}")
    partitioned = [x for x in (head.weight, head.bias) if x is not None and hasattr(x, "ds_id")]
    with _gathered(partitioned) if partitioned else nullcontext():
        bias = None if head.bias is None else _whole(head.bias, dtype, mean)
        yield replace(head, weight=_whole(head.weight, dtype, mean), bias=bias)


def _whole(x: Tensor, dtype: torch.dtype | None, mean: bool) -> Tensor:
    if isinstance(x, DTensor):
        whole: Tensor = _FullTensor.apply(x, dtype or x.dtype, mean)
        return whole
    return x if dtype is None else x.to(dtype)


class _FullTensor(torch.autograd.Function):
    """DTensor.full_tensor takes the gradient of every rank for the same one; here they are parts of it."""

    @staticmethod
    def forward(ctx: Any, x: DTensor, dtype: torch.dtype, mean: bool) -> Tensor:
        ctx.mesh, ctx.placements, ctx.dtype, ctx.mean = x.device_mesh, x.placements, x.dtype, mean
        cast: Any = x.to(dtype)
        whole: Tensor = cast.full_tensor()
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        parts = DTensor.from_local(grad.to(ctx.dtype), ctx.mesh, [Partial()] * ctx.mesh.ndim, run_check=False)
        shard = parts.redistribute(placements=ctx.placements)
        return shard.div_(ctx.mesh.size()) if ctx.mean else shard, None, None


def _gathered(parameters: list[Tensor]) -> Any:
    try:
        zero = importlib.import_module("deepspeed").zero
    except ImportError as error:
        raise ValueError(
            f"expected deepspeed to be importable for a head that ZeRO-3 has partitioned, got: {error}"
        ) from error
    return zero.GatheredParameters(parameters)
