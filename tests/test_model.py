"""What the model section of a config does to a model: freeze, adapter, dropout, seed, autocast."""

from __future__ import annotations

import pytest
import torch

from opsd.affect.tiny import TinySize, build
from opsd.config import load_config
from opsd.group import micro_batches
from opsd.loading import load_model
from opsd.metrics import Sums
from opsd.opening import open_run
from opsd.step import learn, sample, teach
from tests.jobs import text_job


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("model")


def open_model(folder, *words, seed=0):
    return load_model(text_job(folder, *words).model, seed)


def test_what_is_frozen_is_not_trained_and_the_rest_is(tmp_path):
    frozen = ("model.layers.0.", "model.embed_tokens.")
    with open_run(text_job(tmp_path, f"model.freeze=[{', '.join(frozen)}]")) as run:
        parameters = dict(run.model.module.named_parameters())
        start = {name: p.detach().clone() for name, p in parameters.items()}
        assert run.model.trainable().keys() == {name for name in parameters if not name.startswith(frozen)}
        for group in micro_batches(run.config, sample(run, run.rows(0), 0)):
            learn(run, group, teach(run, group), Sums()).backward()
        assert all((p.grad is None) == name.startswith(frozen) for name, p in parameters.items())
        run.optimizer.step(0)
    for name, p in parameters.items():
        assert torch.equal(p, start[name]) == name.startswith(frozen), name


def test_an_adapter_stays_inside_the_decoder(tmp_path):
    size = TinySize(width=32, inner=64, layers=1, heads=2, vision_width=32, audio_width=32)
    build(tmp_path / "model", ["a low voice"], size, seed=0)
    model = load_model(load_config(None, [f"model.path={tmp_path / 'model'}", "model.adapter=lora"]).model)
    base = model.module.get_base_model()
    decoder = {id(p) for p in base.get_decoder().parameters()}
    names = list(model.trainable())
    assert names and all("lora_" in name for name in names)
    assert [name for name, p in model.trainable().items() if id(p) not in decoder] == []
    linear = [m for m in base.get_decoder().modules() if hasattr(m, "lora_A")]
    assert len(linear) == 7, "q, k, v, o, gate, up and down of the layer"


def test_an_adapter_is_a_function_of_the_seed(folder):
    def factors(seed):
        return open_model(folder, "model.adapter=lora", seed=seed).trainable()

    torch.manual_seed(11)
    first = factors(1)
    torch.manual_seed(22)
    again, other = factors(1), factors(2)
    assert first and all(torch.equal(first[name], again[name]) for name in first)
    assert all(torch.equal(first[n], other[n]) == (".lora_B." in n) for n in first), "B starts at zero, A is drawn"


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_lora_dropout_is_the_rate_of_the_config(folder, rate):
    model = open_model(folder, "model.adapter=lora", f"model.lora_dropout={rate}")
    dropped = [
        layer.lora_dropout["default"]
        for layer in model.module.modules()
        if hasattr(layer, "lora_dropout") and hasattr(layer, "lora_A")
    ]
    ones = torch.ones(10_000)
    with model.mode(train=True):
        zeros = [(module(ones) == 0).float().mean().item() for module in dropped]
    assert len(dropped) == 14 and zeros == pytest.approx([rate] * 14, abs=0.03)


@pytest.mark.parametrize(
    ("words", "weights", "outputs"),
    [
        (("model.dtype=bfloat16",), torch.float32, torch.bfloat16),
        (("model.dtype=bfloat16", "model.adapter=lora"), torch.bfloat16, torch.bfloat16),
        (("model.dtype=float32",), torch.float32, torch.float32),
    ],
)
def test_bfloat16_computes_in_bf16_and_trains_fp32_weights_without_an_adapter(folder, words, weights, outputs):
    model = open_model(folder, *words)
    decoder = (model.module.get_base_model() if model.has_adapter else model.module).get_decoder()
    seen = []
    hook = decoder.layers[0].self_attn.q_proj.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    model.forward(input_ids=torch.tensor([[5, 6, 7]]))
    hook.remove()
    assert seen == [outputs]
    assert model.head.weight.dtype == weights and decoder.layers[1].mlp.up_proj.weight.dtype == weights
    assert not torch.is_autocast_enabled("cpu")


def test_computed_prefixes_are_told_apart_by_dtype_and_layers(folder):
    """The same fp32 weights, computed with in fp32, in bf16, and by Liger's layers."""
    exact, mixed = open_model(folder), open_model(folder, "model.dtype=bfloat16")
    names = {exact.compute, mixed.compute, open_model(folder).compute}
    exact.fused = True
    assert len(names) == 2 and exact.compute not in names
