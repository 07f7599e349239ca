"""AdamW with moments of 8 bits, or in memory that pages to the host: bitsandbytes' (`optim.kind`).

    adamw_8bit        both moments as codes of one byte with an fp32 scale for each 256 (block-wise dynamic
                      quantization, arXiv 2110.02861): 2.03 bytes a parameter instead of 8
    paged_adamw       fp32 moments in CUDA's managed memory: they leave the device while something else needs it
    paged_adamw_8bit  both

Exact moments are kept, as bitsandbytes advises, for embeddings, whose rare rows would share a scale with frequent
ones, and for parameters of fewer than 4096 numbers: norms and biases. Those below 100,000 are never paged.

bitsandbytes takes the number of the update from the host, and its kernels have no operand that makes them change
nothing. So the host asks the device once an update, with `optim.in_backward` once a parameter, whether it is to be left
out. There it waits anyway: bitsandbytes' `step` waits for the device after every parameter. To undo an update on the
device would take copies of weights and moments, and more traffic than the update.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from opsd.adamw import Parameters, of_parameter
from opsd.bnb import bitsandbytes
from opsd.config import OptimConfig
from opsd.say import say_once

_BLOCK = 256  # codes with one scale
_SMALL = 4096  # below, moments are fp32
_UNPAGED = 100_000  # below, they stay on the device
_HELD = ("state1", "state2", "absmax1", "absmax2")  # by bitsandbytes' names; the tables of codes are constants


class LowBitAdamW:
    def __init__(self, parameters: Parameters, embeddings: Collection[str], config: OptimConfig):
        """embeddings: names of parameters whose moments stay exact. Raises InputError without bitsandbytes."""
        library = bitsandbytes("optim.kind")
        self.parameters = parameters
        paged = is_paged(config) and all(p.is_cuda for p in parameters.values())
        if is_paged(config) and not paged:
            say_once("moments are not paged: on a CPU they are in the host's memory anyway")
        sorts: dict[int, list[nn.Parameter]] = {8: [], 32: []}
        for name, p in parameters.items():
            sorts[8 if is_8bit(config) and name not in embeddings else 32].append(p)
        self.parts = [
            library.optim.AdamW(
                members,
                lr=config.lr,
                betas=config.betas,
                eps=config.eps,
                weight_decay=config.weight_decay,
                optim_bits=bits,
                min_8bit_size=_SMALL,
                is_paged=paged,
            )
            for bits, members in sorts.items()
            if members
        ]

    def step(self, rate: float, bad: Tensor) -> None:
        if bad.item():
            return
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def state(self) -> dict[str, Tensor]:
        found = {}
        for name, _, _, state in self._states():
            if state:
                found[f"{name}/step"] = torch.tensor(state["step"])
                found |= {f"{name}/{key}": state[key] for key in _HELD if key in state}
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, part, place, state in self._states():
            if saved := of_parameter(tensors, name):
                group = part.param_groups[0]
                part.init_state(group, group["params"][place], 0, place)  # paged where it has to be
                state["step"] = int(saved.pop("step"))
                for key, tensor in saved.items():
                    state[key].copy_(tensor)

    def _states(self) -> Iterator[tuple[str, Any, int, dict[str, Any]]]:
        """Name, optimizer, place in it and state of every parameter; the state is empty before the first update."""
        names = {p: name for name, p in self.parameters.items()}
        for part in self.parts:
            for place, p in enumerate(part.param_groups[0]["params"]):
                yield names[p], part, place, part.state[p]


def is_8bit(config: OptimConfig) -> bool:
    return config.kind.endswith("8bit")


def is_paged(config: OptimConfig) -> bool:
    return config.kind.startswith("paged")


def embedding_names(module: nn.Module, parameters: Parameters) -> set[str]:
    """Names of trained parameters that some embedding holds, a tied head's among them."""
    held = {id(child.weight) for child in module.modules() if isinstance(child, nn.Embedding)}
    return {name for name, p in parameters.items() if id(p) in held}


@dataclass(frozen=True)
class Moments:
    """What the moments of parameters take."""

    resident: list[Tensor]  # on the device for good
    paged: list[list[Tensor]]  # of each parameter, there while it is updated


def moments_of(parameters: Parameters, embeddings: Collection[str], config: OptimConfig, cuda: bool) -> Moments:
    """Empty tensors like the moments of `optim.kind`, on the parameters' device, which may be meta."""
    resident, paged = [], []
    for name, p in parameters.items():
        if is_8bit(config) and name not in embeddings and p.numel() >= _SMALL:
            codes = [p.new_empty(p.shape, dtype=torch.uint8) for _ in range(2)]
            resident += [p.new_empty(-(-p.numel() // _BLOCK), dtype=torch.float32) for _ in range(2)]
        else:
            codes = [torch.empty_like(p, dtype=torch.float32) for _ in range(2)]
        if is_paged(config) and cuda and p.numel() >= _UNPAGED:
            paged.append(codes)
        else:
            resident += codes
    return Moments(resident, paged)
