"""AdamW as torch computes it, with fp32 moments: the default, which the low-bit ones are compared with."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from opsd.config import OptimConfig
from opsd.sharding import divided, on_host

Parameters = dict[str, nn.Parameter]


class AdamW(Protocol):
    """An update rule over named parameters."""

    def step(self, rate: float, bad: Tensor) -> None:
        """Update from the gradients. bad: (), 1.0 where nothing may change, weights, moments and count, else 0.0."""

    def state(self) -> dict[str, Tensor]:
        """What the next update depends on, as `<parameter name>/<key>`."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave."""


class ExactAdamW:
    """torch's fused AdamW. It is told on the device to change nothing, so the host does not look."""

    def __init__(self, parameters: Parameters, config: OptimConfig):
        self.parameters = parameters
        self.adamw = torch.optim.AdamW(
            parameters.values(),
            lr=config.lr,
            betas=config.betas,
            eps=config.eps,
            weight_decay=config.weight_decay,
            fused=True,
        )

    def step(self, rate: float, bad: Tensor) -> None:
        for group in self.adamw.param_groups:
            group["lr"] = rate
        setattr(self.adamw, "found_inf", bad)  # noqa: B010 - as torch.amp.GradScaler tells a fused optimizer
        self.adamw.step()

    def state(self) -> dict[str, Tensor]:
        state = self.adamw.state
        return {f"{n}/{key}": on_host(t) for n, p in self.parameters.items() for key, t in state.get(p, {}).items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            if state := of_parameter(tensors, name):
                self.adamw.state[p] = {
                    key: t.to(p.device) if key == "step" else divided(t, p) for key, t in state.items()
                }


def of_parameter(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors of one parameter, by key; names themselves may hold dots, never a slash."""
    return {key.rpartition("/")[2]: t for key, t in tensors.items() if key.rpartition("/")[0] == name}
