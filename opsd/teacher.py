"""The teacher: the same model, seeing more. Three kinds, one interface.

`frozen`  the starting weights (adapter off, or a copy of the trained parameters taken at the start)
`ema`     theta_T <- mu theta_T + (1 - mu) theta after every update, in fp32   (OmniOPSD, arXiv 2606.15920)
`live`    the student itself, gradients stopped

After an update that is left out (`skipped_updates`) the teacher stays where it is, as the student does.
After n updates an EMA teacher still is mu^n its start (90.5 % after 100 updates at mu = 0.999): choose mu for the
length of the run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opsd.adapter import without_adapter
from opsd.config import TeacherConfig
from opsd.engine import response_hidden
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.sharding import alike, divided, on_host, own
from opsd.teacher_cache import TeacherCache
from opsd_kernels import Head


class Teacher(Protocol):
    """Whose weights the model wears while it scores."""

    own_head: bool  # where the head is trained, theirs is another
    updates: int | None  # how often they have moved in this process; None where they never do

    def weights(self) -> Any:
        """Context manager: inside, the model runs with the teacher's weights."""

    def update(self, skipped: Tensor | float = 0.0) -> None:
        """Follow the student, after an optimizer step. skipped: 1.0 where that was left out; () on the device."""

    def state(self) -> dict[str, Tensor]:
        """What a resumed run needs, whole, by name; empty where the student's checkpoint says it all."""

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        """Take what `state` gave."""


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
    with torch.no_grad(), model.mode(train=False), teacher.weights(), model.gathered():
        if cache is not None and share_prefix:
            again = again if again is not None else [False] * len(prompts)
            hidden = cache.hidden(model, teacher.updates, prompts, responses, again)
        else:
            hidden = response_hidden(model, prompts, responses, share_prefix)
        head = model.head
        if not (teacher.own_head and any(x.requires_grad for x in (head.weight, head.bias) if x is not None)):
            return hidden, None
        # Outside the context the parameters point at the student's storage again; this detached view does not.
        view = head.view()
        if model.shards is not None:  # what was gathered is gone there
            view = replace(view, weight=view.weight.clone(), bias=None if view.bias is None else view.bias.clone())
        return hidden, view


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
    own_head = False

    def __init__(self) -> None:
        self.updates: int | None = 0

    @contextmanager
    def weights(self) -> Iterator[None]:
        yield

    def update(self, skipped: Tensor | float = 0.0) -> None:
        self.updates = _next(self.updates)

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class AdapterOffTeacher:
    """The base model under the adapter: nothing to store, nothing to update."""

    own_head = False

    def __init__(self, module: Any):
        self.module = module
        self.updates: int | None = None

    @contextmanager
    def weights(self) -> Iterator[None]:
        with without_adapter(self.module):
            yield

    def update(self, skipped: Tensor | float = 0.0) -> None: ...

    def state(self) -> dict[str, Tensor]:
        return {}

    def load_state(self, tensors: dict[str, Tensor]) -> None: ...


class ShadowTeacher:
    """fp32 copies of the trained parameters: fixed (mu None) or their moving average.

    With an adapter and both factors trained this averages A and B apart, which is not the average of A B: the
    named approximation `teacher.lora_average: factors`. Of divided parameters each process copies its slices.
    """

    own_head = True

    def __init__(self, parameters: dict[str, nn.Parameter], mu: float | None):
        self.parameters, self.mu = parameters, mu
        self.updates: int | None = None if mu is None else 0
        self.shadow = {name: own(p.detach()).float().clone() for name, p in parameters.items()}

    @contextmanager
    def weights(self) -> Iterator[None]:
        students = {name: p.data for name, p in self.parameters.items() if not isinstance(p, DTensor)}
        self._exchange()
        try:
            for name in students:
                self.parameters[name].data = self.shadow[name].to(self.parameters[name].dtype)  # if alike, a pointer
            yield
        finally:
            for name, student in students.items():
                self.parameters[name].data = student
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        """Swap the contents of slices and shadows: what FSDP2 gathers is a memory of its own, not `p.data`."""
        for name, p in self.parameters.items():
            if isinstance(p, DTensor):
                student = own(p).clone()
                own(p).copy_(self.shadow[name])
                self.shadow[name].copy_(student)

    @torch.no_grad()
    def update(self, skipped: Tensor | float = 0.0) -> None:
        if self.mu is not None:
            self.updates = _next(self.updates)
            shadows = list(self.shadow.values())
            students = [own(p.detach()).float() for p in self.parameters.values()]
            torch._foreach_lerp_(shadows, students, [_step(self.mu, skipped, like) for like in shadows])

    def state(self) -> dict[str, Tensor]:
        return {name: on_host(alike(self.shadow[name], p)) for name, p in self.parameters.items()}

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, p in self.parameters.items():
            self.shadow[name].copy_(own(divided(tensors[name], p)))


class DenseAverageTeacher:
    """The exact moving average of delta-W = s B A, one dense fp32 matrix per adapted layer.

    An average of low-rank updates has a higher rank than the adapter, so factors cannot hold it. The average is applied
    beside the base weight, x W + x avg: added into a bf16 weight, an average a thousandth of its size would round away.
    It costs 4 bytes per adapted weight, here and in each checkpoint; `teacher.lora_average: freeze_a` is exact too and
    costs nothing.
    """

    own_head = False

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
            with without_adapter(self.module):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    @torch.no_grad()
    def update(self, skipped: Tensor | float = 0.0) -> None:
        self.updates = _next(self.updates)
        for name, layer in self.layers.items():
            self.average[name].lerp_(self._delta(layer), _step(self.mu, skipped, self.average[name]))

    def state(self) -> dict[str, Tensor]:
        return self.average

    def load_state(self, tensors: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(tensors[name])

    @staticmethod
    def _delta(layer: Any) -> Tensor:
        return layer.get_delta_weight("default").detach().float().clone()


def _step(mu: float, skipped: Tensor | float, like: Tensor) -> Tensor:
    """() how far an average goes towards the student; nowhere, to the bit, after an update that was left out."""
    return torch.as_tensor((1.0 - mu) * (1.0 - skipped), dtype=like.dtype, device=like.device)


def _next(updates: int | None) -> int:
    return (updates or 0) + 1


def _adds(average: Tensor) -> Any:
    """A forward hook: y -> y + x avg, for weights of nn.Linear (out, in) and of transformers' Conv1D (in, out)."""

    def hook(layer: nn.Module, args: tuple[Tensor], output: Tensor) -> Tensor:
        matrix = average.to(args[0].dtype)
        return output + args[0] @ (matrix.mT if isinstance(layer, nn.Linear) else matrix)

    return hook
