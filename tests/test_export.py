"""`python -m opsd.export`: what plain transformers opens is what was trained; a folder is there whole or not at all."""

from __future__ import annotations

import pytest
import torch
import transformers
from safetensors.torch import load_file

from opsd import export as module
from opsd.export import export, main, merged
from opsd.opening import open_run
from opsd.train import train
from tests.family_jobs import family_job
from tests.jobs import text_job
from tests.omni_models import WHOLE

IDS = torch.tensor([[5, 6, 7, 8]])


def plain(folder, cls):
    return getattr(transformers, cls).from_pretrained(folder).eval()


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_an_exported_run_opens_in_plain_transformers(adapter, tmp_path, capsys):
    config = text_job(tmp_path, f"model.adapter={adapter}", "train.steps=2", "optim.lr=1e-2")
    run = train(config)
    assert main([str(config.train.run_dir), str(tmp_path / "out")]) == 0
    assert f"LlamaForCausalLM.from_pretrained('{tmp_path / 'out'}')" in capsys.readouterr().out
    with torch.no_grad():
        logits = plain(tmp_path / "out", "LlamaForCausalLM")(IDS).logits
        torch.testing.assert_close(logits, run.model.module(input_ids=IDS).logits, rtol=1e-4, atol=1e-4)
        assert (logits - plain(config.model.path, "LlamaForCausalLM")(IDS).logits).abs().max() > 1e-3
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == run.model.tokenizer.chat_template
    kept = transformers.GenerationConfig.from_pretrained(tmp_path / "out")
    assert kept.eos_token_id == tokenizer.eos_token_id
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in names and not {n for n in names if "adapter" in n or "trainer" in n}


def test_the_next_stage_starts_from_an_export(tmp_path):
    """The frozen teacher of a distillation that follows a cold start with an adapter is the cold-started model."""
    cold = text_job(tmp_path, "model.adapter=lora", "objective.kind=sft", "optim.lr=1e-2", "evaluate.teacher=false")
    train(cold)
    export(cold.train.run_dir, tmp_path / "merged")
    words = [f"model.path={tmp_path / 'merged'}", "model.adapter=lora", "teacher.kind=frozen", "train.steps=1"]
    run = train(text_job(tmp_path, *words, f"train.run_dir={tmp_path / 'next'}"))
    with run.teacher.weights(), torch.no_grad():
        wanted = plain(tmp_path / "merged", "LlamaForCausalLM")(IDS).logits
        torch.testing.assert_close(run.model.module(input_ids=IDS).logits, wanted)


def test_bf16_weights_are_rounded_once(tmp_path):
    with open_run(text_job(tmp_path, "model.adapter=lora", "model.dtype=bfloat16")) as run, torch.no_grad():
        layer = run.model.module.get_base_model().get_decoder().layers[0].self_attn.q_proj
        torch.nn.init.normal_(layer.lora_B["default"].weight, generator=torch.Generator().manual_seed(0))
        start = layer.get_base_layer().weight.clone()
        delta = 2.0 * layer.lora_B["default"].weight.float() @ layer.lora_A["default"].weight.float()
        weight = merged(run.model.module).get_decoder().layers[0].self_attn.q_proj.weight
    assert weight.dtype == torch.bfloat16 and not torch.equal(weight, start)
    exact = start.double() + delta.double()
    assert ((weight.double() - exact).abs() <= exact.abs() * 2.0**-8 * 1.001).all(), "half a unit in the last place"


@pytest.mark.parametrize(("name", "adapter"), [("qwen2_5_omni", "none"), ("qwen3_omni_moe", "lora")])
def test_a_thinker_goes_back_into_its_whole_checkpoint(name, adapter, tmp_path, capsys):
    config = family_job(tmp_path, name, f"model.adapter={adapter}", "train.steps=1", whole=True)
    run = train(config)
    prompt = run.prompts.student(run.train[0]).inputs
    with torch.no_grad():
        trained = run.model.module(**prompt).logits

    assert "--full writes the whole model" in export(config.train.run_dir, tmp_path / "thinker")
    inner = run.model.module.get_base_model() if adapter == "lora" else run.model.module
    with torch.no_grad():
        alone = plain(tmp_path / "thinker", type(inner).__name__)(**prompt).logits
    torch.testing.assert_close(alone, trained, rtol=1e-4, atol=1e-4)

    assert main([str(config.train.run_dir), str(tmp_path / "whole"), "--full"]) == 0
    assert "talker" in capsys.readouterr().out
    cls = type(WHOLE[name](inner)).__name__
    start, whole = (plain(folder, cls) for folder in (config.model.path, tmp_path / "whole"))
    with torch.no_grad():
        torch.testing.assert_close(whole.thinker(**prompt).logits, trained, rtol=1e-4, atol=1e-4)
    for key, tensor in start.state_dict().items():
        if not key.startswith("thinker."):
            assert torch.equal(whole.state_dict()[key], tensor), key
    files = [sorted(p.name for p in folder.iterdir()) for folder in (tmp_path / "model", tmp_path / "whole")]
    assert files[0] == files[1]


def test_what_cannot_be_exported_is_said(tmp_path, capsys):
    config = text_job(tmp_path, "train.steps=1")
    train(config)
    run_dir = str(config.train.run_dir)
    for words, expected in (
        ([str(tmp_path / "none"), str(tmp_path / "out")], "none"),
        ([run_dir, str(tmp_path / "model")], "'OUT': expected a new or empty folder"),
        ([run_dir, str(tmp_path / "rows.jsonl")], "found a file"),
        ([run_dir, str(tmp_path / "no" / "out")], "no folder"),
        ([run_dir, str(tmp_path / "out"), "--full"], "a run that began from a whole Omni checkpoint"),
    ):
        assert main(words) == 2
        assert expected in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_run_whose_start_is_gone_is_exported_from_its_checkpoint(tmp_path):
    config = text_job(tmp_path, "train.steps=1")
    train(config)
    (tmp_path / "model").rename(tmp_path / "elsewhere")
    export(config.train.run_dir, tmp_path / "out")
    last = load_file(config.train.run_dir / "checkpoints" / "last" / "model.safetensors")
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(written[key], tensor) for key, tensor in last.items())


def test_a_failure_leaves_nothing_and_a_killed_one_is_swept_away(tmp_path, monkeypatch):
    config = text_job(tmp_path, "train.steps=1")
    train(config)
    out = tmp_path / "out"

    def fail(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(module, "_save", fail)
        assert main([str(config.train.run_dir), str(out)]) == 2
    assert not out.exists() and not list(tmp_path.glob(".out*"))
    (tmp_path / ".out.tmp").mkdir()
    (tmp_path / ".out.tmp" / "half").write_text("")
    out.mkdir()
    export(config.train.run_dir, out)
    assert not (out / "half").exists() and (out / "config.json").exists()
