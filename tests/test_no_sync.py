"""No step waits for the device. Shown without one: meta tensors have no values that a host could ask for, and a
dispatch mode refuses copies from the host that block."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.attention_plan import plan
from opsd.data import read_examples
from opsd.decode import Room, Slots
from opsd.engine import forward, prefill, response_hidden
from opsd.loading import load_model
from opsd.objectives.logprobs import token_logprobs
from opsd.objectives.reward import reward_loss
from opsd.packing import Packed, Tree
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from opsd.sampling import Sampling
from tests.jobs import text_job

META = torch.device("meta")
# What has a shape that depends on values, or gives one to the host: on CUDA, each of them waits.
WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "is_nonzero", "equal")


class NoWaiting(TorchDispatchMode):
    """Raises for a call that would make the host wait for the device its tensors are on."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.removeprefix("aten::")
        tensors = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.Tensor)]
        on_device = any(x.device == META for x in tensors)
        assert not (on_device and name in WAITING), name
        if name == "_to_copy" and tensors[0].device.type == "cpu" and torch.device(kwargs.get("device", "cpu")) == META:
            assert kwargs.get("non_blocking"), "a copy to the device that waits"
        if name == "copy_" and args[0].device == META and args[1].device.type == "cpu" and args[1].ndim:
            assert kwargs.get("non_blocking") or (len(args) > 2 and args[2]), "a copy to the device that waits"
        if name.startswith(("index", "_index_put")) and on_device:
            masks = [x for x in args[1] if x is not None] if len(args) > 1 and isinstance(args[1], list | tuple) else []
            assert not any(x.dtype == torch.bool for x in masks), "a boolean index"
        return func(*args, **kwargs)


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    """The text job's model, without values, and its prompts, which are on the host."""
    config = text_job(tmp_path_factory.mktemp("no_sync"))
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = [builder.student(e) for e in read_examples(config.data.train, config.data)[:3]]
    model = copy.copy(model)
    model.module, model.device = model.module.to(META), META
    return model, prompts


def responses_of(lengths: tuple[int, ...], per_prompt: int) -> Responses:
    tokens = torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=META)
    return Responses(tokens, lengths, tuple(i // per_prompt for i in range(len(lengths))), None)


def test_the_mode_notices_what_waits():
    x = torch.zeros(3, device=META)
    with NoWaiting():
        for wait in (
            lambda: x.nonzero(),
            lambda: torch.tensor([1]).to(META),
            lambda: x[x > 0],
            lambda: x.copy_(torch.zeros(3)),
            lambda: x.sum().item(),
        ):
            with pytest.raises((AssertionError, RuntimeError)):
                wait()


def test_forward_loss_and_backward_never_wait(setting):
    model, prompts = setting
    responses = responses_of((3, 1, 7, 2, 2, 4), per_prompt=2)
    with NoWaiting():
        hidden = response_hidden(model, prompts, responses)
        logprobs = token_logprobs(hidden, model.head, responses.packed_tokens)
        advantages = torch.zeros(6, device=META)
        loss = reward_loss(logprobs, advantages, responses.lengths, responses.token_weights)
        loss.backward()
    assert hidden.shape == (19, 32)


def test_a_pass_over_kept_prompts_never_waits(setting):
    model, prompts = setting
    responses = responses_of((3, 1, 7, 2, 2, 4), per_prompt=2)
    with torch.no_grad(), NoWaiting():
        kept = prefill(model, prompts)
        hidden, _ = forward(model, prompts, responses, known=kept)
    assert hidden.shape == (19, 32)


@pytest.mark.parametrize(
    "sampling",
    [Sampling(2, 6), Sampling(2, 6, temperature=0.7, top_k=5, top_p=0.9, min_p=0.1), Sampling.greedy(6)],
    ids=["plain", "filtered", "greedy"],
)
def test_decode_steps_never_wait(setting, sampling):
    model, prompts = setting
    with torch.no_grad(), NoWaiting():
        kept = prefill(model, prompts)
        slots = Slots(model, Room(4, 3, max(p.length for p in prompts), 6), sampling, kept[0])
        slots.draw.reset([1, 2, 3])
        for lane, stored in enumerate(kept):
            slots.let_in(lane, stored)
        slots.begin([0, 1, 2], [0, 2, 4], kept)
        slots.arrange([[0], [1], [2]], fixed=True)
        for _ in range(3):
            slots.step(slots.capacity)
    assert slots.token.shape == (4,)


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("ragged", [False, True])
def test_plans_never_wait(window, ragged):
    trees = (Tree(5, (3, 2)), Tree(4, (6, 1, 2), stored=True), Tree(2, (4,)))
    with NoWaiting():
        assert plan(Packed(trees), window, ragged, META)
