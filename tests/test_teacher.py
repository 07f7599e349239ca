"""Teachers: closed forms, weights restored, heads told apart, LoRA averages exact where they claim to be."""

from __future__ import annotations

import pytest
import torch

from opsd.config import TeacherConfig
from opsd.data import read_examples
from opsd.engine import Responses, response_hidden
from opsd.loading import load_model
from opsd.prompts import PromptBuilder
from opsd.teacher import build_teacher, score
from tests.jobs import text_job

MU = 0.9


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("teacher")


def open_model(folder, *words):
    config = text_job(folder, *words)
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    examples = read_examples(config.data.train, config.data)[:2]
    responses = Responses.pack([[5, 6, 7, 2], [8, 2]], 1, model.pad_id, model.device)
    return model, [builder.teacher(e) for e in examples], responses


def disturb(model, seed):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.trainable().values():
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


def snapshot(model):
    return {n: p.detach().clone() for n, p in model.module.named_parameters()}


def delta(model):
    return {
        n: m.get_delta_weight("default").detach().clone()
        for n, m in model.module.named_modules()
        if hasattr(m, "get_delta_weight") and getattr(m, "lora_A", None)
    }


@pytest.mark.parametrize("words", [(), ("model.adapter=lora",), ("model.adapter=lora", "teacher.lora_average=factors")])
@pytest.mark.parametrize("kind", ["ema", "frozen", "live"])
def test_scoring_puts_the_students_weights_back_and_gives_no_gradient(folder, words, kind):
    model, prompts, responses = open_model(folder, *words)
    config = text_job(folder, *words, f"teacher.kind={kind}", f"teacher.mu={MU}").teacher
    teacher = build_teacher(config, model)
    disturb(model, 1)
    before = snapshot(model)
    hidden, head = score(teacher, model, prompts, responses)
    assert not hidden.requires_grad and (head is None or not head.weight.requires_grad)
    for name, p in model.module.named_parameters():
        assert torch.equal(p, before[name]), name
    student = response_hidden(model, prompts, responses)
    assert torch.equal(hidden, student.detach()) == (kind == "live")


def test_frozen_is_the_start_and_ema_follows_its_closed_form(folder):
    model, prompts, responses = open_model(folder)
    start = snapshot(model)
    with torch.no_grad():
        first = response_hidden(model, prompts, responses)
    frozen = build_teacher(TeacherConfig(kind="frozen"), model)
    ema = build_teacher(TeacherConfig(kind="ema", mu=MU), model)
    students = []
    for step in range(3):
        disturb(model, step)
        students.append(snapshot(model))
        frozen.update()
        ema.update()
    torch.testing.assert_close(score(frozen, model, prompts, responses)[0], first)
    for name, shadow in ema.state().items():
        want = MU**3 * start[name].double() + sum(
            (1 - MU) * MU ** (2 - i) * s[name].double() for i, s in enumerate(students)
        )
        torch.testing.assert_close(shadow.double(), want, rtol=1e-6, atol=1e-6)
        assert shadow.dtype == torch.float32


def test_heads_are_shared_where_they_are_the_same_tensor(folder, tmp_path):
    model, prompts, responses = open_model(folder)  # tied and trained: the shadow has a head of its own
    ema = build_teacher(TeacherConfig(kind="ema", mu=MU), model)
    assert score(build_teacher(TeacherConfig(kind="live"), model), model, prompts, responses)[1] is None
    disturb(model, 0)
    head = score(ema, model, prompts, responses)[1]
    assert head is not None and not torch.equal(head.weight, model.head.weight)
    model, prompts, responses = open_model(folder, "model.adapter=lora")
    for kind in ("ema", "frozen", "live"):
        assert score(build_teacher(TeacherConfig(kind=kind), model), model, prompts, responses)[1] is None


@pytest.mark.parametrize("average", ["dense", "freeze_a", "factors"])
def test_average_of_an_adapter_is_exact_unless_named_approximate(folder, average):
    model, prompts, responses = open_model(folder, "model.adapter=lora")
    teacher = build_teacher(TeacherConfig(kind="ema", mu=MU, lora_average=average), model)
    deltas = [delta(model)]
    for step in range(3):
        disturb(model, step)
        deltas.append(delta(model))
        teacher.update()
    weights = [MU**3, *((1 - MU) * MU ** (2 - i) for i in range(3))]
    want = {n: sum(w * d[n].double() for w, d in zip(weights, deltas, strict=True)) for n in deltas[0]}
    if average == "dense":
        got = teacher.state()
    else:
        with teacher.weights():
            got = delta(model)
    error = max(((got[n].double() - want[n]).norm() / want[n].norm()).item() for n in want)
    assert error < 1e-5 if average != "factors" else error > 0.01
    # and the scored hidden states are those of base + averaged delta
    with torch.no_grad():
        expected = reference_hidden(model, got, prompts, responses)
    torch.testing.assert_close(score(teacher, model, prompts, responses)[0], expected, rtol=1e-4, atol=1e-4)


def reference_hidden(model, deltas, prompts, responses):
    layers = dict(model.module.named_modules())
    with model.module.disable_adapter():
        for name, d in deltas.items():
            layers[name].get_base_layer().weight.data += d
        hidden = response_hidden(model, prompts, responses)
        for name, d in deltas.items():
            layers[name].get_base_layer().weight.data -= d
    return hidden


def test_freeze_a_trains_b_only(folder):
    model, *_ = open_model(folder, "model.adapter=lora")
    build_teacher(TeacherConfig(kind="ema", lora_average="freeze_a"), model)
    assert model.trainable() and all(".lora_B." in name for name in model.trainable())


def test_a_small_average_is_not_lost_in_a_bf16_base(folder):
    """Added into the weight, an average a thousandth of its size would round away."""
    model, *_ = open_model(folder, "model.adapter=lora", "model.dtype=bfloat16")
    teacher = build_teacher(TeacherConfig(kind="ema", mu=MU), model)
    layer = next(iter(teacher.layers.values())).get_base_layer()
    x = torch.randn(5, layer.in_features).bfloat16()
    generator = torch.Generator().manual_seed(0)
    for average in teacher.average.values():
        average.copy_(1e-3 * layer.weight.float().std() * torch.randn(average.shape, generator=generator))
    average = next(iter(teacher.average.values()))
    seen = []
    handle = layer.register_forward_hook(lambda *_: None)
    with torch.no_grad(), teacher.weights():
        hook = list(layer._forward_hooks.values())[-1]
        seen.append(hook(layer, (x,), torch.zeros(5, layer.out_features)))
    handle.remove()
    want = x.double() @ average.double().T
    assert ((seen[0].double() - want).norm() / want.norm()).item() < 0.01
    assert not layer._forward_hooks


@pytest.mark.parametrize("words", [(), ("model.adapter=lora",)], ids=["weights", "dense average of an adapter"])
def test_an_average_stays_where_it_is_after_an_update_that_was_left_out(folder, words):
    model, _, _ = open_model(folder, *words)
    teacher = build_teacher(TeacherConfig(kind="ema", mu=MU), model)
    disturb(model, 0)
    start = {name: x.clone() for name, x in teacher.state().items()}
    teacher.update(torch.tensor(1.0))
    assert all(torch.equal(x, start[name]) for name, x in teacher.state().items())
    teacher.update(torch.tensor(0.0))
    assert not all(torch.equal(x, start[name]) for name, x in teacher.state().items())
