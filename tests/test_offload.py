"""Layer inputs on the host: gradients of plain checkpointing to the bit; every copy counted, waited for and gone."""

from __future__ import annotations

import gc
import weakref
from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

import opsd.loading
import opsd.train
from opsd.config import Config
from opsd.errors import InputError
from opsd.offload import LayerInputs, SameMemory, _Input, offload
from opsd.plan.names import ACTIVATIONS, INPUTS, ON_HOST, on_device
from opsd.plan.outline import outline
from opsd.plan.plan import make_plan
from opsd.plan.table import rendered
from opsd.plan.workload import Longest, Workload
from opsd.train import train
from tests.families import FAMILIES
from tests.jobs import text_job
from tests.test_families import RECOMPUTED, models, run  # noqa: F401 - models is a fixture

DEPTH, SIZE = 5, (1, 6, 8)
NUMBERS = 4 * 6 * 8


class Late:
    """Copies happen when they are waited for and no sooner; what was let go before that is lost, and reads as NaN."""

    def __init__(self) -> None:
        self.waits = 0

    def out(self, x: Tensor) -> tuple[Tensor, Any]:
        kept, source = torch.full_like(x, torch.nan), weakref.ref(x)
        return kept, lambda: None if source() is None else kept.copy_(source())

    def back(self, kept: Tensor) -> tuple[Tensor, Any]:
        x = torch.full_like(kept, torch.nan)
        coming = weakref.ref(x)
        return x, lambda: coming().copy_(kept)

    def wait(self, done: Any) -> None:
        self.waits += 1
        done()


class Wrong(SameMemory):
    """Brings back something else."""

    def back(self, kept: Tensor) -> tuple[Tensor, Any]:
        return kept + 1e-3, None


def layers() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Dropout(0.2)) for _ in range(DEPTH))


def gradients(call: Any, x: Tensor, made: nn.ModuleList | None = None) -> list[Tensor]:
    made = made or layers()
    torch.manual_seed(1)
    for layer in made:
        x = call(layer, x)
    x.square().sum().backward()
    return [p.grad for p in made.parameters()]


def plain(function: Any, *args: Any) -> Any:
    return checkpoint(function, *args, use_reentrant=False)


def equal(mine: list[Tensor], theirs: list[Tensor]) -> bool:
    return len(mine) == len(theirs) > 0 and all(map(torch.equal, mine, theirs))


@pytest.mark.parametrize("lane", [None, Late], ids=["same memory", "late"])
@pytest.mark.parametrize("grad", [False, True])
def test_gradients_are_those_of_checkpointing_and_bytes_are_counted(lane, grad):
    inputs = LayerInputs(lane and lane())
    x, other = (torch.randn(SIZE, generator=torch.Generator().manual_seed(2), requires_grad=grad) for _ in range(2))
    assert equal(gradients(inputs.checkpoint, x), gradients(plain, other))
    assert not grad or torch.equal(x.grad, other.grad)
    assert inputs.copied == DEPTH * NUMBERS
    assert inputs.fetched == (DEPTH - 2) * NUMBERS, "the last two had not left"
    assert equal(gradients(inputs.checkpoint, x), gradients(plain, x)), "and a second time"
    assert inputs.copied == 2 * DEPTH * NUMBERS


def test_what_comes_back_is_what_was_on_the_host():
    x = torch.randn(SIZE)
    assert not equal(gradients(LayerInputs(Wrong()).checkpoint, x), gradients(plain, x))


def test_the_device_holds_two_on_their_way_out_and_one_on_its_way_in():
    lane, seen = Late(), list[StorageWeakRef]()
    arrived: list[StorageWeakRef] = []
    back = lane.back

    def watched(kept: Tensor) -> tuple[Tensor, Any]:
        found = back(kept)
        arrived.append(StorageWeakRef(found[0].untyped_storage()))
        assert sum(not one.expired() for one in arrived) <= 2, "one that is used, one that comes"
        return found

    lane.back = watched  # type: ignore[method-assign]
    under_way: list[int] = []

    def noted(layer: nn.Module, x: Tensor) -> Tensor:
        under_way.append(len(arrived))
        return layer(x)

    inputs, x, made = LayerInputs(lane), torch.randn(SIZE), layers()
    for layer in made:
        x = inputs.checkpoint(noted, layer, x)
        seen.append(StorageWeakRef(x.untyped_storage()))
    assert [one.expired() for one in seen[:-1]] == [True] * (DEPTH - 3) + [False] * 2
    before = lane.waits
    loss = x.square().sum()
    loss.backward(retain_graph=True)
    assert all(one.expired() for one in arrived), "a graph that is kept keeps nothing on the device"
    first = [p.grad.clone() for p in made.parameters()]
    loss.backward()
    assert equal([p.grad for p in made.parameters()], [2 * grad for grad in first])
    assert under_way[DEPTH:] == [0, 1, 2, 3, 3, 5, 6, 7, 8, 8], "the next comes while a layer is computed again"
    assert lane.waits == before + 2 * DEPTH, "each is waited for once, by the device"
    del x, loss
    gc.collect()
    assert all(one.expired() for one in (*seen, *arrived))
    assert not inputs._known


def test_a_tensor_that_several_layers_get_is_copied_once():
    inputs, made, shared = LayerInputs(Late()), layers(), torch.randn(SIZE, requires_grad=True)
    again = shared.detach().clone().requires_grad_()

    def summed(call: Any, given: Tensor) -> None:
        x = torch.ones(SIZE)
        torch.manual_seed(1)
        for layer in made:
            x = call(lambda a, b, layer=layer: layer(a) + b, x, given)
        x.sum().backward()

    summed(inputs.checkpoint, shared)
    summed(plain, again)
    assert torch.equal(shared.grad, again.grad)
    assert inputs.copied == (DEPTH + 1) * NUMBERS


def test_other_values_in_the_same_memory_are_another_tensor():
    inputs, shared, x = LayerInputs(), torch.ones(SIZE), torch.ones(SIZE, requires_grad=True)
    y = x
    for i in range(DEPTH):
        y = inputs.checkpoint(lambda a, b: a * b.exp(), y, shared)
        if i == 3:  # the first values have left long ago
            shared.add_(1)
    assert inputs.copied == (DEPTH + 2) * NUMBERS
    y.sum().backward()
    torch.testing.assert_close(x.grad, torch.ones(SIZE).mul(4 + 2).exp())


def test_layouts_types_and_indices_stay_as_they_are():
    inputs, seen = LayerInputs(), []
    x = torch.randn(4, 6, requires_grad=True).t()
    index = torch.tensor([2, 0])

    def layer(a: Tensor, at: Tensor) -> Tensor:
        seen.append((a.stride(), a.dtype, at.dtype))
        return (a.bfloat16()[at] ** 2).float()

    y = inputs.checkpoint(layer, x, index)
    for _ in range(2):
        y = inputs.checkpoint(lambda a: a.exp(), y)
    y.sum().backward()
    assert len(seen) == 2 and seen[0] == seen[1] == ((1, 6), torch.float32, torch.int64)
    assert inputs.copied == 4 * (24 + 8 + 8), "indices are not worth it"


def test_an_input_that_is_changed_in_place_is_refused():
    """As plain checkpointing refuses it, in its backward."""
    inputs, x = LayerInputs(Late()), torch.ones(SIZE)
    y = inputs.checkpoint(lambda a: a * nn.Parameter(torch.ones(8)), x)
    x.add_(1)
    y = inputs.checkpoint(torch.exp, y)
    with pytest.raises(RuntimeError, match="changed in place"):
        inputs.checkpoint(torch.exp, y)


def test_an_error_in_the_backward_leaves_nothing():
    inputs, seen = LayerInputs(Late()), list[StorageWeakRef]()
    made, x = layers(), torch.randn(SIZE)

    def fails(grad: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for i, layer in enumerate(made):
        x = inputs.checkpoint(layer, x)
        seen.append(StorageWeakRef(x.untyped_storage()))
        if i == 2:
            x.register_hook(fails)
    with suppress(torch.OutOfMemoryError):
        x.sum().backward()
    del x
    gc.collect()
    assert all(one.expired() for one in seen) and not inputs._known
    assert equal(gradients(inputs.checkpoint, torch.ones(SIZE)), gradients(plain, torch.ones(SIZE)))


# in the model


@pytest.fixture(scope="module", params=["qwen3_vl", "qwen2_5_omni"])
def family(request):
    return FAMILIES[request.param]


def test_families_with_towers(models, family):  # noqa: F811
    """Deepstack, towers and packed rows, in fp64: what checkpointing gives, to the bit."""
    model, found = models["none"], []
    inputs = LayerInputs(Late())
    for offloads in (False, True):
        if offloads:
            offload(model.module, inputs, context_fn=RECOMPUTED["context_fn"])
        else:
            model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTED)
        found.append(run(model, family, 8, shared=True, train=True))
    model.module.gradient_checkpointing_disable()
    assert inputs.copied > 0 and torch.equal(found[0][0], found[1][0])
    assert all(torch.equal(found[0][3][name], grad) for name, grad in found[1][3].items())


def trained(folder: Any, monkeypatch: Any, value: str, *words: str) -> tuple[list[Tensor], LayerInputs | None]:
    made: list[LayerInputs] = []

    def factory() -> LayerInputs:
        made.append(LayerInputs(Late()))
        return made[-1]

    with monkeypatch.context() as patch:
        patch.setattr(opsd.loading, "LayerInputs", factory)
        config = text_job(folder, f"model.activation_checkpointing={value}", f"train.run_dir={folder / value}", *words)
        done = train(config)
    return list(done.model.trainable().values()), made[0] if made else None


@pytest.mark.parametrize(
    "words", [(), ("model.adapter=lora", "model.lora_dropout=0.3")], ids=["all weights", "adapter"]
)
def test_a_run_is_that_of_plain_checkpointing_to_the_bit(tmp_path, monkeypatch, words):
    short = ("train.steps=2", "checkpoint.every=0", "teacher.mu=0.5", *words)
    kept, _ = trained(tmp_path, monkeypatch, "false", *short)
    theirs, nothing = trained(tmp_path, monkeypatch, "true", *short)
    assert equal(theirs, kept), "and dropout is drawn again where layers are computed again"
    mine, inputs = trained(tmp_path, monkeypatch, "offload", *short)
    assert nothing is None and inputs is not None and inputs.copied > 0 and not inputs._known
    assert equal(mine, theirs)


def test_a_retried_step_starts_without_the_copies_of_the_failed_one(tmp_path, monkeypatch):
    left: list[int] = []
    again = opsd.train.fitted.__globals__["within_memory"]

    def watched(attempt: Any, budget: Any, largest: Any, start_again: Any, device: Any) -> Any:
        def started() -> None:
            gc.collect()
            left.append(sum(type(one) is _Input for one in gc.get_objects()))
            start_again()

        return again(attempt, budget, largest, started, device)

    learn, calls = opsd.train.learn, []

    def fails_once(*args: Any) -> Tensor:
        loss = learn(*args)
        calls.append(loss.shape)
        if len(calls) == 2:
            loss.register_hook(lambda _: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA out of memory")))
        return loss

    monkeypatch.setitem(opsd.train.fitted.__globals__, "within_memory", watched)
    monkeypatch.setattr(opsd.train, "learn", fails_once)
    _, inputs = trained(tmp_path, monkeypatch, "offload", "train.steps=1", "checkpoint.every=0")
    assert left == [0] and inputs is not None and not inputs._known


# in the config and the plan


def test_other_words_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"activation_checkpointing.*expected true or false or one of offload"):
        text_job(tmp_path, "model.activation_checkpointing=host")
    for word, value in (("true", True), ("false", False), ("offload", "offload")):
        assert text_job(tmp_path, f"model.activation_checkpointing={word}").model.activation_checkpointing == value


def plan_of(config: Config, cuda: bool) -> Any:
    model = outline(config.model, config.engine, None, cuda)
    return make_plan(config, model, Workload.of(config, Longest(200, 220, rows=1)), cuda, 1 << 40)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_moves_the_inputs_to_the_host(tmp_path, dtype):
    layers = 6
    plans = {}
    for value in ("true", "offload"):
        words = f"model.activation_checkpointing={value}", f"model.dtype={dtype}", "engine.token_budget=4096"
        config = text_job(tmp_path, *words, "objective.workspace_mib=1")
        file = tmp_path / "model" / "config.json"
        file.write_text(file.read_text().replace('"num_hidden_layers": 2', f'"num_hidden_layers": {layers}'))
        plans[value] = plan_of(config, cuda=True)
    kept, moved = plans["true"].phases["student"], plans["offload"].phases["student"]
    tokens = plans["true"].whole
    one = 1 << (4 * 32 * tokens - 1).bit_length()  # fp32 at the layers' boundaries, in blocks of a power of two
    assert kept[INPUTS] == 0 and moved[INPUTS] == pytest.approx(layers * one, rel=0.5)
    saved = kept[ACTIVATIONS] - moved[ACTIVATIONS]
    assert saved > 0.5 * (layers - 3) * 4 * 32 * 4 * 200
    assert on_device(moved) == sum(moved.values()) - moved[INPUTS]
    said = rendered(plans["offload"])
    assert said.index("\nall ") < said.index(f"\n{INPUTS}") and INPUTS in ON_HOST
    assert plan_of(config, cuda=False).phases["student"][INPUTS] == 0, "a CPU has one memory"
