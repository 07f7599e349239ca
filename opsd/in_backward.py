"""AdamW within the backward: `optim.in_backward`, for training all weights on a small GPU.

A weight is updated as soon as its gradient is whole, and the gradient is freed: at a time there are those of about one
layer, not of the model. No operation reads a weight after its update: the gradient is whole only when all of them have
had their backward. What holds:

- One pass, no clip: weights and moments are those of `Optimizer`, to the bit. A loss that is no number moves nothing. A
  gradient that is none leaves out its weight and those that come after it in the backward; the ones before have moved,
  which nobody can take back: the log counts that in `partial_updates` and says so. Low-bit kinds make the host wait
  for the device at every weight.
- One pass, `max_grad_norm`: the backward runs twice, first for the norm alone, then for the updates. All is as in
  `Optimizer`, what it leaves out too; a limit that is never reached makes the first case safe.
- Several passes: the gradients of all weights have to meet before the clip and the update, so this is `Optimizer`. That
  is said once; a larger `engine.token_budget` makes one pass of a step.

A backward that runs out of memory is done again in smaller passes while no weight has moved, else the run ends. Several
processes add up their gradients when all are whole: `opsd.checks` refuses them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from opsd.adamw import AdamW
from opsd.config import OptimConfig
from opsd.errors import InputError
from opsd.model import LanguageModel
from opsd.optim import Optimizer, Skipped, adamw_of, not_finite
from opsd.say import say_once
from opsd.world import World

_SEVERAL = (
    "optim.in_backward: updates of several passes hold the gradients of all weights; "
    "a larger engine.token_budget makes one pass of a step"
)
_TWICE = "optim.in_backward: the backward runs twice, for the norm and for the update; optim.max_grad_norm=null once"

Visit = Callable[[str, nn.Parameter], None]


@dataclass
class _Update:
    """One that is being made in the backward."""

    rate: float
    bad: Tensor  # (), 1.0 from the first value on that is no number
    some: Tensor  # (), 1.0 once a weight has moved before such a value
    norm: Tensor | None = None  # of the whole gradient, where it is known before the first weight moves
    norms: dict[str, Tensor] = field(default_factory=dict)  # of every gradient
    begun: bool = False  # as far as the host knows


class InBackward(Optimizer):
    """An Optimizer whose `backward` makes the update where it can, and leaves no gradient."""

    def __init__(self, model: LanguageModel, config: OptimConfig, steps: int, world: World | None = None):
        super().__init__(model, config, steps, world)
        assert self.world.size == 1, "the gradients of several processes meet when all are whole"
        self.each = {name: adamw_of(model, {name: p}, config) for name, p in self.parameters.items()}
        self.adamw = _Apart(self.each)
        self.torn = Skipped()
        self._update: _Update | None = None
        self._visit: Visit | None = None
        for name, p in self.parameters.items():
            p.register_post_accumulate_grad_hook(partial(self._whole, name))

    def backward(self, loss: Tensor, step: int, alone: bool) -> None:
        if not alone:
            say_once(_SEVERAL)
            loss.backward()
            return
        bad = not_finite(loss.detach())
        self._update = update = _Update(self.rate(step), bad, torch.zeros_like(bad))
        if self.config.max_grad_norm is not None:
            say_once(_TWICE)
            self._run(loss, self._measure, retain_graph=True)
            update.norm = self._norm(update)
            update.bad = not_finite(update.norm + loss.detach())
            if self.config.kind != "adamw":  # those ask on the host, once here instead of at every weight
                update.bad = update.bad.cpu()
        self._run(loss, self._move)

    def step(self, step: int, loss: Tensor | float = 0.0) -> dict[str, Tensor | float]:
        """What the update was; one of several passes is made here."""
        update, self._update = self._update, None
        if update is None:
            return super().step(step, loss)
        self.skipped.add(update.bad)
        self.torn.add(update.bad * update.some)
        return {"grad_norm": self._norm(update) if update.norm is None else update.norm, "lr": update.rate}

    def restart(self) -> None:
        update, self._update = self._update, None
        if update is not None and update.begun:
            hint = "model.activation_checkpointing=offload needs less, and may be set when --resume goes on"
            found = "out of memory in a backward that had moved weights already (optim.in_backward)"
            raise InputError("memory for a step", found, field="engine.token_budget", hint=hint)
        super().restart()

    def metrics(self) -> dict[str, float]:
        """partial_updates: since the last call, those in which some weights moved before a gradient was no number."""
        return {"partial_updates": float(self.torn.take()[0])}

    def _run(self, loss: Tensor, visit: Visit, retain_graph: bool = False) -> None:
        self._visit = visit
        try:
            loss.backward(retain_graph=retain_graph)
        finally:
            self._visit = None

    def _whole(self, name: str, p: nn.Parameter) -> None:
        """Autograd's hook: the gradient has everything that this backward adds to it."""
        if self._visit is not None:
            self._visit(name, p)
            p.grad = None

    def _measure(self, name: str, p: nn.Parameter) -> None:
        assert self._update is not None and p.grad is not None
        self._update.norms[name] = torch.linalg.vector_norm(p.grad)

    def _move(self, name: str, p: nn.Parameter) -> None:
        update = self._update
        assert update is not None
        if update.norm is not None:
            assert self.config.max_grad_norm is not None
            clip_grads_with_norm_([p], self.config.max_grad_norm, update.norm)
        else:
            self._measure(name, p)
            update.bad = torch.maximum(update.bad, not_finite(update.norms[name]))
            update.some = torch.maximum(update.some, 1.0 - update.bad)
        update.begun = True
        self.each[name].step(update.rate, update.bad)

    def _norm(self, update: _Update) -> Tensor:
        """Of the whole gradient, its parts in the order in which `Optimizer` adds them."""
        return get_total_norm([update.norms[name] for name in self.parameters if name in update.norms])


class _Apart:
    """AdamW of every parameter as an AdamW of all: the arithmetic and the state are the same."""

    def __init__(self, each: dict[str, AdamW]):
        self.each = each

    def step(self, rate: float, bad: Tensor) -> None:
        for one in self.each.values():
            one.step(rate, bad)

    def state(self) -> dict[str, Tensor]:
        found: dict[str, Any] = {}
        for one in self.each.values():
            found |= one.state()
        return found

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for one in self.each.values():
            one.load_state(tensors)
