"""AdamW with 8-bit and paged moments: near exact AdamW, to the bit where left out or resumed, in a whole run."""

from __future__ import annotations

import math
import shutil
import sys
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from opsd.adamw_low_bit import embedding_names, moments_of
from opsd.config import OptimConfig, load_config
from opsd.errors import InputError
from opsd.optim import Optimizer
from opsd.run_dirs import with_run_dir
from opsd.train import train
from tests.jobs import text_job
from tests.test_resume import assert_same, weights

KINDS = ("adamw_8bit", "paged_adamw", "paged_adamw_8bit")
LIBRARY = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")


class Toy:
    """A matrix large enough for 8 bits, a bias, an embedding, and one parameter that never gets a gradient."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.ModuleDict(
            {"linear": nn.Linear(96, 100), "embedding": nn.Embedding(64, 96), "unused": nn.Linear(64, 64, bias=False)}
        )

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def give_gradients(self, step: int) -> None:
        generator = torch.Generator().manual_seed(100 + step)
        for name, p in self.trainable().items():
            if "unused" not in name:
                p.grad = torch.randn(p.shape, generator=generator)


def trained(kind: str, steps: int = 8, **values: object) -> tuple[Toy, Optimizer]:
    model = Toy()
    optimizer = Optimizer(model, OptimConfig(kind=kind, lr=1e-2, weight_decay=0.1, **values), steps)
    for step in range(steps):
        model.give_gradients(step)
        optimizer.step(step)
    return model, optimizer


def distance(ours: Toy, theirs: Toy, name: str) -> float:
    """Between two models, over the way that the second has come from the start."""
    start, a, b = (dict(m.module.named_parameters())[name].detach() for m in (Toy(), ours, theirs))
    return float((a - b).norm() / (b - start).norm())


@LIBRARY
@pytest.mark.parametrize("kind", KINDS)
def test_it_goes_where_exact_adamw_goes(kind):
    exact, _ = trained("adamw")
    ours, _ = trained(kind)
    assert distance(ours, exact, "linear.weight") < (0.05 if "8bit" in kind else 1e-5)
    for name in ("linear.bias", "embedding.weight"):
        assert distance(ours, exact, name) < 1e-5, "small parameters and embeddings keep exact moments"
    if "8bit" in kind:
        assert distance(ours, exact, "linear.weight") > 1e-4, "codes, not floats"


@LIBRARY
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("what", ["nan", "inf", "loss"])
def test_an_update_that_is_no_number_changes_nothing(kind, what):
    runs = []
    for bad_at in (None, 2):
        model = Toy()
        optimizer = Optimizer(model, OptimConfig(kind=kind, lr=1e-2), 5)
        for step in range(4):
            if step == bad_at:
                model.give_gradients(step)
                if what != "loss":
                    model.trainable()["linear.weight"].grad[3, 3] = float(what)
                optimizer.step(step, torch.tensor(math.nan if what == "loss" else 1.0))
            model.give_gradients(step)
            optimizer.step(step)
        runs.append(model.trainable() | optimizer.state())
        assert optimizer.skipped.take() == (0 if bad_at is None else 1, 0)
    assert runs[0].keys() == runs[1].keys()
    assert all(torch.equal(runs[0][name], runs[1][name]) for name in runs[0])


class Asked(TorchDispatchMode):
    """Counts how often the host asks for the value of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.times += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@LIBRARY
@pytest.mark.parametrize("kind", KINDS)
def test_the_host_asks_once_an_update_and_for_exact_moments_never(kind):
    for one, times in ((kind, 1), ("adamw", 0)):
        model = Toy()
        optimizer = Optimizer(model, OptimConfig(kind=one, lr=1e-2, max_grad_norm=1.0), 5)
        for step in range(2):
            model.give_gradients(step)
            with Asked() as asked:
                optimizer.step(step, torch.tensor(1.0))
            assert asked.times == times


@LIBRARY
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_loaded_goes_on_to_the_bit(kind):
    model, optimizer = trained(kind, 3)
    again = Toy()
    again.module.load_state_dict(model.module.state_dict())
    resumed = Optimizer(again, optimizer.config, 8)
    resumed.load_state({name: tensor.clone() for name, tensor in optimizer.state().items()})
    assert resumed.state().keys() == optimizer.state().keys()
    assert not any("unused" in name for name in optimizer.state())
    for step in range(3, 8):
        for one, its in ((model, optimizer), (again, resumed)):
            one.give_gradients(step)
            its.step(step)
    ours, theirs = again.trainable() | resumed.state(), model.trainable() | optimizer.state()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@LIBRARY
@pytest.mark.parametrize("kind", KINDS)
def test_the_plan_counts_its_bytes(kind):
    model, optimizer = trained(kind, 1)
    trains = {name: p for name, p in model.trainable().items() if "unused" not in name}
    names = embedding_names(model.module, trains)
    assert names == {"embedding.weight"}
    planned = moments_of(trains, names, optimizer.config, cuda=False)
    held = [x for name, x in optimizer.state().items() if not name.endswith("/step")]
    assert not planned.paged
    assert sorted((x.shape, x.dtype) for x in planned.resident) == sorted((x.shape, x.dtype) for x in held)


def test_paged_moments_are_planned_beside_the_device():
    large = {"large": nn.Parameter(torch.empty(1000, 200, device="meta"))}
    plan = moments_of(large, (), OptimConfig(kind="paged_adamw_8bit"), cuda=True)
    assert [sum(x.nbytes for x in one) for one in plan.paged] == [2 * 200_000]
    assert sum(x.nbytes for x in plan.resident) == 2 * 4 * math.ceil(200_000 / 256)
    assert not moments_of(large, (), OptimConfig(kind="adamw_8bit"), cuda=True).paged
    assert sum(x.nbytes for x in moments_of(large, ("large",), OptimConfig(), cuda=True).resident) == 8 * 200_000


@LIBRARY
def test_a_resumed_run_equals_one_that_was_not_stopped(tmp_path):
    words = ("optim.kind=paged_adamw_8bit", "model.adapter=lora", "model.lora_r=64", "teacher.kind=frozen")
    whole = text_job(tmp_path, *words, "checkpoint.keep=9")
    train(whole)
    assert torch.uint8 in {x.dtype for x in weights(whole.train.run_dir).values()}
    cut = tmp_path / "cut"
    shutil.copytree(whole.train.run_dir, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    train(with_run_dir(whole, cut), resume=True)
    assert_same(cut, whole.train.run_dir)


def test_without_the_library_it_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(InputError, match=r"optim\.kind.*bitsandbytes.*opsd-trainer\[quant\]"):
        Optimizer(Toy(), OptimConfig(kind="adamw_8bit"), 1)


def test_a_divided_model_is_refused():
    with pytest.raises(InputError, match=r"optim\.kind.*fsdp"):
        load_config(None, ["model.path=x", "optim.kind=adamw_8bit", "train.parallel=fsdp"])
