"""FSDP2: every process keeps a slice of each weight, its gradient and its AdamW moments (`train.parallel: fsdp`).

The student's forward and backward gather one layer at a time; what lies outside the layers (embedding, head, towers) is
one more unit, whole from the student's forward to the end of its backward. A rollout and a teacher's pass gather the
whole model once, in the dtype it computes in, and let go of it afterwards: they keep no activations, and the processes
need not go in step. An adapter is small and stays whole on every process; what is divided then is its base.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


class Shards:
    """The units of a divided model."""

    def __init__(self, module: Any, device: torch.device, mixed: bool):
        """module: a transformers model, without peft's wrapper. mixed: fp32 weights that compute in bf16."""
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
        trains = {name: p for name, p in module.named_parameters() if p.requires_grad}
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": policy,
            "ignored_params": {p for name, p in trains.items() if ".lora_" in name},
        }
        for layer in module.get_decoder().layers:
            fully_shard(layer, **options)
        fully_shard(module, **options)
        self.units: list[FSDPModule] = [unit for unit in module.modules() if isinstance(unit, FSDPModule)]
        for unit in self.units:  # token weights are those of the whole step: gradients add up
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)
            if hasattr(unit, "set_reduce_scatter_unused_params"):  # torch 2.13: rows without media leave a tower unused
                unit.set_reduce_scatter_unused_params(True, recurse=False)
        self._depth = 0

    @contextmanager
    def gathered(self) -> Iterator[None]:
        """Inside, every weight is whole; the outermost block gathers, and lets go at its end."""
        self._depth += 1
        try:
            if self._depth == 1:
                for unit in self.units:
                    unit.set_reshard_after_forward(False, recurse=False)
                    unit.unshard()
            yield
        finally:
            self._depth -= 1
            if self._depth == 0:
                for unit in self.units:
                    unit.reshard()
                    unit.set_reshard_after_forward(unit is not self.units[0], recurse=False)


def own(x: Tensor) -> Tensor:
    """This process's slice of a divided tensor, sharing its memory; any other tensor itself."""
    return x.to_local() if isinstance(x, DTensor) else x


def alike(slice_: Tensor, like: Tensor) -> Tensor:
    """The divided tensor whose slice this is, as `own` of one like `like` gave it; any other tensor itself."""
    if not isinstance(like, DTensor):
        return slice_
    shape, stride = like.shape, like.stride()
    return DTensor.from_local(slice_, like.device_mesh, like.placements, run_check=False, shape=shape, stride=stride)


def whole(x: Tensor) -> Tensor:
    """All of a divided tensor, on every process, each of which has to ask; any other tensor itself."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def on_host(x: Tensor) -> Tensor:
    """`whole`, in host memory where it was divided: one tensor at a time is whole on the device."""
    return whole(x).cpu() if isinstance(x, DTensor) else x


def divided(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor on `like`'s device, divided as `like` is."""
    x = x.to(like.device)
    return distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x
