"""The teacher: the same model, seeing more. Three kinds, one interface.

`frozen`  the starting weights (adapter off, or a copy of the trained parameters taken at the start)
`ema`     theta_T <- mu theta_T + (1 - mu) theta after every update, in fp32   (OmniOPSD, arXiv 2606.15920)
`live`    the student itself, gradients stopped

After n updates an EMA teacher still is mu^n its start (90.5 % after 100 updates at mu = 0.999): choose mu for the
length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from opsd.config import TeacherConfig
from opsd.engine import response_hidden
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.teacher_cache import TeacherCache
from opsd_kernels import Head


class Teacher(Protocol):
    """Whose weights the model wears while it scores."""

    updates: int | None  # how often they have moved in this process; None where they never do

    def weights(self) -> Any:
        """Context manager: inside, the model runs with the teacher's weights."""

    def update(self) -> None:
        """Follow the student, after an optimizer step."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, by name; empty where the student's checkpoint says it all."""


def score(
    teacher: Teacher,
    model: LanguageModel,
    prompts: list[Prompt],
    responses: Responses,
    share_prefix: bool = True,
    cache: TeacherCache | None = None,
    again: Sequence[bool] | None = None,
) -> tuple[Tensor, Head | None]:
    """Teacher hidden states (N, E) of the response tokens under the teacher's prompts, and its head.

    again: prompts that another pass of this step will need, for the cache.

    The head is None where it is the student's own: the loss then uses the difference of the hidden states.
    """
    own = model.head.view()
    with torch.no_grad(), model.mode(train=False), teacher.weights():
        if cache is not None and share_prefix:
            again = again if again is not None else [False] * len(prompts)
            hidden = cache.hidden(model, teacher.updates, prompts, responses, again)
        else:
            hidden = response_hidden(model, prompts, responses, share_prefix)
        # Outside the context the parameters point at the student's storage again; this detached view does not.
        head = model.head.view()
    return hidden, None if head.equals(own) else head


def build_teacher(config: TeacherConfig, model: LanguageModel) -> Teacher:
    """The teacher of the config; it must be built before the first update."""
    if config.kind == "live":
        return LiveTeacher()
    if not model.has_adapter:
        return ShadowTeacher(model.trainable(), None if config.kind == "frozen" else config.mu)
    if config.kind == "frozen":
        return AdapterOffTeacher(model.module)
    if config.lora_average == "dense":
        return DenseAverageTeacher(model.module, config.mu)
    if config.lora_average == "freeze_a":  # with A fixed, averaging B averages delta-W exactly
        for name, parameter in model.module.named_parameters():
            if ".lora_A." in name:
                parameter.requires_grad_(False)
    return ShadowTeacher(model.trainable(), config.mu)


class LiveTeacher:
    def __init__(self) -> None:
        self.updates: int | None = 0

    @contextmanager
    def weights(self) -> Iterator[None]:
        yield

    def update(self) -> None:
        self.updates = _next(self.updates)

    def state(self) -> dict[str, Tensor]:
        return {}


class AdapterOffTeacher:
    """The base model under the adapter: nothing to store, nothing to update."""

    def __init__(self, module: Any):
        self.module = module
        self.updates: int | None = None

    @contextmanager
    def weights(self) -> Iterator[None]:
        with self.module.disable_adapter():
            yield

    def update(self) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}


class ShadowTeacher:
    """fp32 copies of the trained parameters: fixed (mu None) or their moving average.

    With an adapter and both factors trained this averages A and B apart, which is not the average of A B: the
    named approximation `teacher.lora_average: factors`.
    """

    def __init__(self, parameters: dict[str, nn.Parameter], mu: float | None):
        self.parameters, self.mu = parameters, mu
        self.updates: int | None = None if mu is None else 0
        self.shadow = {name: p.detach().float().clone() for name, p in parameters.items()}

    @contextmanager
    def weights(self) -> Iterator[None]:
        own = {name: p.data for name, p in self.parameters.items()}
        try:
            for name, p in self.parameters.items():
                p.data = self.shadow[name].to(p.dtype)  # same dtype: a pointer, not a copy
            yield
        finally:
            for name, p in self.parameters.items():
                p.data = own[name]

    @torch.no_grad()
    def update(self) -> None:
        if self.mu is not None:
            self.updates = _next(self.updates)
            shadows = list(self.shadow.values())
            students = [p.detach().float() for p in self.parameters.values()]
            torch._foreach_lerp_(shadows, students, 1.0 - self.mu)

    def state(self) -> dict[str, Tensor]:
        return self.shadow


class DenseAverageTeacher:
    """The exact moving average of delta-W = s B A, one dense fp32 matrix per adapted layer.

    An average of low-rank updates has a higher rank than the adapter, so factors cannot hold it. The average is applied
    beside the base weight, x W + x avg: added into a bf16 weight, an average a thousandth of its size would round away.
    It costs 4 bytes per adapted weight, here and in each checkpoint; `teacher.lora_average: freeze_a` is exact too and
    costs nothing.
    """

    def __init__(self, module: Any, mu: float):
        self.module, self.mu = module, mu
        self.updates: int | None = 0
        self.layers = {
            name: layer
            for name, layer in module.named_modules()
            if hasattr(layer, "get_delta_weight") and getattr(layer, "lora_A", None)
        }
        self.average = {name: self._delta(layer) for name, layer in self.layers.items()}

    @contextmanager
    def weights(self) -> Iterator[None]:
        hooks = [
            layer.get_base_layer().register_forward_hook(_adds(self.average[name]))
            for name, layer in self.layers.items()
        ]
        try:
            with self.module.disable_adapter():
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def update(self) -> None:
        self.updates = _next(self.updates)
        for name, layer in self.layers.items():
            self.average[name].lerp_(self._delta(layer), 1.0 - self.mu)

    def state(self) -> dict[str, Tensor]:
        return self.average

    @staticmethod
    def _delta(layer: Any) -> Tensor:
        return layer.get_delta_weight("default").detach().float().clone()


def _next(updates: int | None) -> int:
    return (updates or 0) + 1


def _adds(average: Tensor) -> Any:
    """A forward hook: y -> y + x avg, for weights of nn.Linear (out, in) and of transformers' Conv1D (in, out)."""

    def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        matrix = average.to(args[0].dtype)
        return output + args[0] @ (matrix.mT if isinstance(layer, nn.Linear) else matrix)

    return hook
