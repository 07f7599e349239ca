"""The update: clip, learning-rate schedule, AdamW. The schedule is a function of the step: nothing to resume."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from opsd.adamw import AdamW, ExactAdamW
from opsd.adamw_low_bit import LowBitAdamW, embedding_names
from opsd.config import OptimConfig
from opsd.model import LanguageModel
from opsd.sharding import whole
from opsd.world import World


class Optimizer:
    """An AdamW over the model's trainable parameters, addressed by name so that a checkpoint can name them too."""

    def __init__(self, model: LanguageModel, config: OptimConfig, steps: int, world: World | None = None):
        self.config, self.steps, self.world = config, steps, world or World()
        self.parameters = model.trainable()
        self.adamw = adamw_of(model, self.parameters, config)
        self.skipped = Skipped()

    def backward(self, loss: Tensor, step: int, alone: bool) -> None:
        """The gradients of a pass, added to those there are. alone: it is the only pass of its update."""
        loss.backward()

    def step(self, step: int, loss: Tensor | float = 0.0) -> dict[str, Tensor | float]:
        """Add up the processes' gradients, clip, update, clear them. step counts from 0.

        Where the loss or the gradient's norm is no finite number, weights and moments stay exactly as they are.
        loss: this process's part of it.
        """
        self.world.add_gradients(self.parameters.values())
        limit = math.inf if self.config.max_grad_norm is None else self.config.max_grad_norm
        norm = whole(torch.nn.utils.clip_grad_norm_(self.parameters.values(), limit))
        rate, bad = self.rate(step), not_finite(norm + self.world.total(loss))
        self.adamw.step(rate, bad)
        self.clear()
        self.skipped.add(bad)
        return {"grad_norm": norm, "lr": rate}

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        return self.config.lr * schedule(self.config, step, self.steps)

    def clear(self) -> None:
        """Throw the gradients away."""
        for parameter in self.parameters.values():
            parameter.grad = None

    def restart(self) -> None:
        """The update is begun again. Raises InputError where that would not give the same."""
        self.clear()

    def metrics(self) -> dict[str, float]:
        """What there is to log beside each update's own, since the last call."""
        return {}

    def state(self) -> dict[str, Tensor]:
        """AdamW's moments as `<parameter name>/<moment>`."""
        return self.adamw.state()

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        self.adamw.load_state(tensors)


def adamw_of(model: LanguageModel, parameters: dict[str, nn.Parameter], config: OptimConfig) -> AdamW:
    """The rule of `optim.kind` for some of the model's parameters."""
    if config.kind == "adamw":
        return ExactAdamW(parameters, config)
    return LowBitAdamW(parameters, embedding_names(model.module, parameters), config)


def not_finite(x: Tensor) -> Tensor:
    """() 1.0 where x, a number, is not finite, else 0.0."""
    return 1.0 - torch.isfinite(x).float()


class Skipped:
    """Updates that were left out, counted on the device."""

    def __init__(self) -> None:
        self._count: Tensor | float = 0.0
        self._in_a_row: Tensor | float = 0.0
        self.last: Tensor | float = 0.0  # of the newest update

    def add(self, bad: Tensor) -> None:
        """bad: 1.0 for an update that was left out, 0.0 for one that was made."""
        self.last, self._count = bad, self._count + bad
        self._in_a_row = (self._in_a_row + 1.0) * bad

    def take(self) -> tuple[int, int]:
        """How many there were since the last call, and how many the last ones in a row are by now."""
        counts = int(self._count), int(self._in_a_row)
        self._count = 0.0
        return counts

    def state(self) -> dict[str, Tensor]:
        """What a resumed run goes on counting from."""
        counts = {"count": self._count, "in_a_row": self._in_a_row}
        return {name: torch.as_tensor(value, dtype=torch.float32) for name, value in counts.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave; nothing of a checkpoint that is from before it was saved."""
        self._count = float(tensors.get("count", 0.0))
        self._in_a_row = float(tensors.get("in_a_row", 0.0))


def schedule(config: OptimConfig, step: int, steps: int) -> float:
    """Factor on the learning rate: linear warm-up, then constant, or linear or cosine down to 0 at the last step."""
    if step < config.warmup_steps:
        return (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return 1.0
    done = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    return 1.0 - done if config.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
