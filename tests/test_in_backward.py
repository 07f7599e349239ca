"""Updates within the backward against the plain optimizer, to the bit; what is alive meanwhile; what cannot be taken
back is said."""

from __future__ import annotations

import math
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import opsd.train
from bench.measure import peak_extra_bytes
from opsd.checks import check_world
from opsd.config import OptimConfig
from opsd.errors import InputError
from opsd.in_backward import InBackward
from opsd.optim import Optimizer
from opsd.run import Run
from opsd.train import train
from opsd.world import World
from tests.jobs import text_job

DEPTH, WIDTH, STEPS = 6, 16, 5
NO_CLIP, CLIP = {"lr": 1e-2, "max_grad_norm": None, "weight_decay": 0.1}, {"lr": 1e-2, "max_grad_norm": 0.3}
CLIPS = pytest.mark.parametrize("values", [NO_CLIP, CLIP], ids=["no clip", "clip"])
LIBRARY = pytest.mark.skipif(find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
ONE_PASS, LAST = "engine.token_budget=10000", "checkpoint.every=0"


class Toy:
    """As much of a model as the optimizer asks for; its first and last layer share a weight, and one is not used."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        self.module = nn.Sequential(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(DEPTH)))
        self.module[-1][0].weight = self.module[0][0].weight
        self.module.register_parameter("unused", nn.Parameter(torch.ones(3)))

    def trainable(self) -> dict[str, nn.Parameter]:
        return dict(self.module.named_parameters())

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(step)
        return self.module(torch.randn(4, WIDTH, generator=generator)).square().sum()


def trained(kind: type[Optimizer], values: dict[str, Any], spoil: Any = None) -> tuple[Toy, Optimizer, list[Any]]:
    """STEPS updates of one pass. spoil: (model, step, loss) -> loss."""
    model, said = Toy(), []
    optimizer = kind(model, OptimConfig(**values), STEPS)
    for step in range(STEPS):
        loss = model.loss(step)
        loss = loss if spoil is None else spoil(model, step, loss)
        optimizer.backward(loss, step, alone=True)
        said.append(optimizer.step(step, loss.detach()))
        assert all(p.grad is None for p in model.trainable().values())
    return model, optimizer, said


def same(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> bool:
    return mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


@CLIPS
def test_updates_are_those_of_the_plain_optimizer_to_the_bit(values):
    mine, theirs = trained(InBackward, values), trained(Optimizer, values)
    assert same(mine[0].trainable(), theirs[0].trainable()) and same(mine[1].state(), theirs[1].state())
    assert [float(x["grad_norm"]) for x in mine[2]] == [float(x["grad_norm"]) for x in theirs[2]]
    assert [x["lr"] for x in mine[2]] == [x["lr"] for x in theirs[2]]
    assert not torch.equal(mine[0].module[1][0].weight, Toy().module[1][0].weight)
    if values is CLIP:
        assert min(float(x["grad_norm"]) for x in mine[2]) > 0.3, "the clip is at work"


@CLIPS
def test_gradients_are_not_alive_together(values):
    model, most = Toy(), [0]
    optimizer = InBackward(model, OptimConfig(**values), STEPS)

    def look(_: nn.Parameter) -> None:
        alive = [p.grad for p in model.trainable().values() if p.grad is not None]
        most[0] = max(most[0], len(alive))

    for p in model.trainable().values():
        p.register_post_accumulate_grad_hook(look)  # after the optimizer's own: nothing is left
    optimizer.backward(model.loss(0), 0, alone=True)
    assert most == [0]


@CLIPS
def test_torch_allocates_less(values):
    """By its own log: gradients of 12 layers in the plain update, of less than 4 here."""
    peaks = {}
    for kind in (Optimizer, InBackward):
        model = nn.Sequential(*(nn.Linear(256, 256, bias=False) for _ in range(12)))
        toy = SimpleNamespace(module=model, trainable=lambda model=model: dict(model.named_parameters()))
        optimizer = kind(toy, OptimConfig(**values), STEPS)

        def update(model: nn.Module = model, optimizer: Optimizer = optimizer) -> None:
            loss = model(torch.ones(1, 256)).sum()
            optimizer.backward(loss, 0, alone=True)
            optimizer.step(0, loss.detach())

        update()  # moments are made
        peaks[kind] = peak_extra_bytes(update, "cpu") / (256 * 256 * 4)
    assert peaks[Optimizer] > 12 and peaks[InBackward] < 4


def test_several_passes_are_the_plain_update():
    models = []
    for kind in (InBackward, Optimizer):
        model = Toy()
        optimizer = kind(model, OptimConfig(**CLIP), STEPS)
        for step in range(STEPS):
            several = step != 2  # one update in between is of one pass
            for part in range(3 if several else 1):
                loss = model.loss(10 * step + part)
                optimizer.backward(loss, step, alone=not several)
            optimizer.step(step, loss.detach())
        models.append((model.trainable(), optimizer.state()))
    assert same(models[0][0], models[1][0]) and same(models[0][1], models[1][1])


@CLIPS
def test_a_loss_that_is_no_number_moves_nothing(values):
    def spoil(model: Toy, step: int, loss: Tensor) -> Tensor:
        return loss + math.inf if step == 2 else loss  # with gradients that are numbers

    mine, theirs = trained(InBackward, values, spoil), trained(Optimizer, values, spoil)
    assert same(mine[0].trainable(), theirs[0].trainable()) and same(mine[1].state(), theirs[1].state())
    assert mine[1].skipped.take() == theirs[1].skipped.take() == (1, 0)
    assert mine[1].metrics() == {"partial_updates": 0.0}


@CLIPS
@pytest.mark.parametrize("layer", [DEPTH - 1, 2])
def test_a_gradient_that_is_no_number(values, layer):
    """With a clip the update is left out whole, as ever; without one, from that layer down, and that is counted. The
    layers below have good gradients."""
    before: dict[str, Tensor] = {}

    def spoil(model: Toy, step: int, loss: Tensor) -> Tensor:
        if step != STEPS - 1:
            return loss
        before.update({name: p.detach().clone() for name, p in model.trainable().items()})
        for p in model.module[layer][0].parameters():
            p.register_hook(lambda grad: torch.full_like(grad, math.nan))
        return model.loss(step)

    model, optimizer, said = trained(InBackward, values, spoil)
    moved = {name for name, p in model.trainable().items() if not torch.equal(p, before[name])}
    assert not math.isfinite(float(said[-1]["grad_norm"])) and optimizer.skipped.take() == (1, 1)
    if values is CLIP or layer == DEPTH - 1:
        assert not moved and optimizer.metrics() == {"partial_updates": 0.0}
    else:
        assert moved == {f"{i}.0.{kind}" for i in range(3, DEPTH) for kind in ("weight", "bias")} - {"5.0.weight"}
        assert optimizer.metrics() == {"partial_updates": 1.0} and optimizer.metrics() == {"partial_updates": 0.0}
    assert all(torch.isfinite(p).all() for p in model.trainable().values())


def test_a_clip_reads_the_whole_norm_not_that_of_a_weight():
    """The update after a tight clip has the direction of the whole gradient, seen through eps."""
    tight = {"lr": 1e-2, "max_grad_norm": 1e-7, "eps": 1e-6}
    mine, theirs = trained(InBackward, tight), trained(Optimizer, tight)
    assert same(mine[0].trainable(), theirs[0].trainable())


def test_an_update_that_has_begun_cannot_begin_again():
    model = Toy()
    optimizer = InBackward(model, OptimConfig(**NO_CLIP), STEPS)
    start = {name: p.detach().clone() for name, p in model.trainable().items()}

    def full(*_: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    handle = model.module[DEPTH - 1][1].register_full_backward_hook(full)  # before any weight
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.backward(model.loss(0), 0, alone=True)
    optimizer.restart()
    assert same(model.trainable(), start) and all(p.grad is None for p in model.trainable().values())
    handle.remove()
    model.module[2][1].register_full_backward_hook(full)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.backward(model.loss(0), 0, alone=True)
    with pytest.raises(InputError, match=r"engine.token_budget.*had moved weights.*in_backward"):
        optimizer.restart()


# in runs


def ran(folder: Any, name: str, *words: str) -> Run:
    return train(text_job(folder, f"train.run_dir={folder / name}", "optim.weight_decay=0.1", ONE_PASS, *words))


def outcome(run: Run) -> dict[str, Tensor]:
    parts = run.model.trainable(), run.optimizer.state(), run.teacher.state()
    return {f"{i}/{name}": x for i, part in enumerate(parts) for name, x in part.items()}


@pytest.mark.parametrize(
    "words",
    [
        ("optim.max_grad_norm=null",),
        ("optim.max_grad_norm=0.01",),
        ("optim.max_grad_norm=null", "model.adapter=lora", "model.lora_dropout=0.2"),
        ("optim.max_grad_norm=0.01", "model.activation_checkpointing=offload", "model.dtype=bfloat16"),
        ("optim.max_grad_norm=0.01", "objective.kind=reward", "objective.updates_per_rollout=2"),
        ("optim.max_grad_norm=0.01", "objective.alpha=0.5", "teacher.kind=live"),
        ("optim.max_grad_norm=0.01", "engine.token_budget=64"),
        pytest.param(("optim.max_grad_norm=0.01", "optim.kind=adamw_8bit"), marks=LIBRARY),
        pytest.param(("optim.max_grad_norm=null", "optim.kind=adamw_8bit"), marks=LIBRARY),
    ],
    ids=[
        "no clip",
        "clip",
        "adapter",
        "checkpointing",
        "reward",
        "live teacher",
        "several passes",
        "8 bits",
        "8 bits, no clip",
    ],
)
def test_a_run_is_that_of_the_plain_optimizer_to_the_bit(tmp_path, words):
    short = ("train.steps=3", LAST)
    theirs = ran(tmp_path, "plain", *short, *words)
    mine = ran(tmp_path, "mine", *short, *words, "optim.in_backward=true")
    assert isinstance(mine.optimizer, InBackward) and same(outcome(mine), outcome(theirs))
    lines = [run.directory.read("metrics") for run in (mine, theirs)]
    for key in ("loss", "grad_norm", "lr", "skipped_updates"):
        assert [line[key] for line in lines[0]] == [line[key] for line in lines[1]], key
    assert all(line["partial_updates"] == 0 for line in lines[0]) and "partial_updates" not in lines[1][0]


@pytest.mark.parametrize("first", [True, False])
def test_a_run_goes_on_the_other_way(tmp_path, first):
    words = ("optim.max_grad_norm=null", "optim.schedule=constant", "checkpoint.every=1")

    def config(steps: int, inside: bool, name: str = "run") -> Any:
        extra = f"train.steps={steps}", f"optim.in_backward={inside}", f"train.run_dir={tmp_path / name}"
        return text_job(tmp_path, ONE_PASS, *words, *extra)

    whole = train(config(4, inside=not first, name="whole"))
    train(config(2, inside=first))
    assert same(outcome(train(config(4, inside=not first), resume=True)), outcome(whole))


def test_a_loss_that_is_no_number_in_a_run(tmp_path, monkeypatch):
    learn, calls = opsd.train.learn, []

    def spoilt(run: Run, part: Any, target: Any, sums: Any) -> Tensor:
        loss = learn(run, part, target, sums)
        calls.append(loss)
        if len(calls) == 2:
            sums.add(loss=math.nan)
            return loss * math.nan
        return loss

    monkeypatch.setattr(opsd.train, "learn", spoilt)
    outcomes = []
    for inside in (True, False):
        calls.clear()
        run = ran(
            tmp_path, str(inside), "train.steps=3", LAST, "optim.max_grad_norm=null", f"optim.in_backward={inside}"
        )
        assert [line["skipped_updates"] for line in run.directory.read("metrics")] == [0, 1, 0]
        outcomes.append(outcome(run))
    assert same(*outcomes)


def test_memory_that_ends_after_weights_moved_ends_the_run(tmp_path, monkeypatch):
    learn = opsd.train.learn

    def full(run: Run, *rest: Any) -> Tensor:
        loss = learn(run, *rest)
        run.model.module.get_decoder().layers[0].mlp.down_proj.weight.register_hook(_out_of_memory)
        return loss

    monkeypatch.setattr(opsd.train, "learn", full)
    with pytest.raises(InputError, match="had moved weights"):
        ran(tmp_path, "run", "optim.max_grad_norm=null", "optim.in_backward=true")
    assert not (tmp_path / "run" / "passes.json").exists(), "smaller passes would hold all gradients"


def _out_of_memory(grad: Tensor) -> Tensor:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_several_processes_are_refused(tmp_path):
    config = text_job(tmp_path, "optim.in_backward=true")
    with pytest.raises(InputError, match=r"optim.in_backward.*false with 2 processes"):
        check_world(config, World(0, 2))
