"""A merged adapter is the model that was trained, and the next stage starts from it."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from opsd.merge import main
from opsd.train import train
from tests.jobs import text_job


@pytest.fixture(scope="module")
def stages(tmp_path_factory):
    """A cold start with an adapter, and its merged model."""
    folder = tmp_path_factory.mktemp("merge")
    words = ["model.adapter=lora", "objective.kind=sft", "optim.lr=1e-2", "evaluate.teacher=false"]
    cold = text_job(folder, *words)
    train(cold)
    assert main([str(cold.train.run_dir), "--out", str(folder / "merged")]) == 0
    return folder, cold


def logits(module):
    with torch.no_grad():
        return module(input_ids=torch.arange(3, 20)[None]).logits


def test_it_says_what_base_and_adapter_said(stages):
    folder, cold = stages
    base = AutoModelForCausalLM.from_pretrained(cold.model.path)
    start = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, cold.train.run_dir / "checkpoints" / "last"))
    merged = AutoModelForCausalLM.from_pretrained(folder / "merged")
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-4, atol=1e-5)
    assert (adapted - start).abs().max() > 0.01
    assert AutoTokenizer.from_pretrained(folder / "merged").chat_template


def test_the_next_stage_starts_from_it(stages):
    folder, _ = stages
    words = [f"model.path={folder / 'merged'}", "model.adapter=lora", "teacher.kind=frozen", "train.steps=1"]
    run = train(text_job(folder, *words, f"train.run_dir={folder / 'next'}"))
    with run.teacher.weights():
        torch.testing.assert_close(
            logits(run.model.module), logits(AutoModelForCausalLM.from_pretrained(folder / "merged"))
        )


def test_bf16_weights_are_rounded_once(tmp_path):
    from opsd.merge import merge
    from opsd.run import open_run

    with open_run(text_job(tmp_path, "model.adapter=lora", "model.dtype=bfloat16")) as run, torch.no_grad():
        layer = run.model.module.get_base_model().get_decoder().layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
        start = layer.get_base_layer().weight.clone()
        delta = 2.0 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        weight = merge(run.model.module).get_decoder().layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, start)
    exact = start.double() + delta.double()
    assert ((weight.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001).all(), "half a unit in the last place"


def test_what_is_no_adapter_and_what_is_in_the_way(tmp_path, stages, capsys):
    _, cold = stages
    assert main([str(cold.train.run_dir), "--out", str(tmp_path)]) == 2
    assert "field '--out': expected a folder that does not exist" in capsys.readouterr().err
    full = text_job(tmp_path, "train.steps=1")
    train(full)
    assert main([str(full.train.run_dir), "--out", str(tmp_path / "m")]) == 2
    assert "expected a run with an adapter; found one without" in capsys.readouterr().err
