"""Parts of a model: what is frozen by name of a part, where an adapter lies, and what is said of both."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from opsd import say
from opsd.adapter import add_lora
from opsd.config import load_config
from opsd.errors import InputError
from opsd.parts import PARTS, freeze, part_of, parts_of, what_trains
from tests.families import FAMILIES, build

OMNI = ("vision", "audio", "projector", "language")
WITH_PARTS = {
    "llama": ("language",),
    "qwen2_5_vl": ("vision", "projector", "language"),
    "qwen3_vl": ("vision", "projector", "language"),
    "qwen2_5_omni": OMNI,
    "qwen3_omni_moe": OMNI,
}


def model_config(*words):
    return load_config(None, ["model.path=x", "model.adapter=lora", *words]).model


def adapted(module, *words):
    wrapped = add_lora(module, model_config(*words), 0, None)
    inner = wrapped.get_base_model()
    return {name for name, child in inner.named_modules() if hasattr(child, "lora_A")}, wrapped


@pytest.fixture(params=WITH_PARTS)
def family(request):
    return request.param


def test_every_parameter_is_in_the_part_where_it_works(family):
    module = build(FAMILIES[family])
    assert parts_of(module) == WITH_PARTS[family]
    decoder = {id(p) for p in module.get_decoder().parameters()} | {id(module.get_output_embeddings().weight)}
    seen = set()
    for name, parameter in module.named_parameters():
        part = part_of(module, name)
        seen.add(part)
        assert (part == "language") == (id(parameter) in decoder), name
        tower = "audio" if "audio_tower" in name else "vision"
        assert part in ("language", "projector", tower), name
    assert seen == set(WITH_PARTS[family])
    ends = [m for n, m in module.named_modules() if isinstance(m, nn.Linear) and part_of(module, n) == "projector"]
    towers = [n for n, m in module.named_modules() if isinstance(m, nn.Linear) and part_of(module, n) in OMNI[:2]]
    width = module.get_decoder().config.hidden_size
    assert bool(ends) == bool(towers) and any(m.out_features == width for m in ends) == bool(ends)
    of_towers = dict(module.named_modules())
    assert all(of_towers[n].out_features != width for n in towers), "what leads to the decoder is the projector's"


def test_every_family_with_towers_has_its_parts():
    known = {build(family).config.model_type for family in FAMILIES.values() if family.media}
    assert known == set(PARTS) - {"gemma3"}


@pytest.mark.parametrize("chosen", [("vision", "audio"), ("language",), ("projector", "model.layers.0")])
def test_parts_and_names_are_frozen_and_nothing_else(chosen):
    module = build(FAMILIES["qwen2_5_omni"])
    freeze(module, chosen)
    for name, p in module.named_parameters():
        wanted = part_of(module, name) in chosen or any(name.startswith(f"{one}.") for one in chosen)
        assert p.requires_grad == (not wanted), name


@pytest.mark.parametrize(
    ("family", "name", "expected"),
    [
        ("llama", "vision", r"a part \(language\) .*'vision' for LlamaForCausalLM"),
        ("qwen2_5_vl", "audio", r"a part \(vision, projector, language\)"),
        ("qwen2_5_omni", "visions", r"did you mean 'vision'"),
        ("llama", "model.layers.2", r"model\.layers\.2"),
    ],
    ids=str,
)
def test_what_a_model_does_not_have_is_refused_with_the_choices(family, name, expected):
    with pytest.raises(InputError, match=expected):
        freeze(build(FAMILIES[family]), [name])


def test_what_trains_is_said_part_by_part():
    module = build(FAMILIES["qwen2_5_omni"])
    size = dict.fromkeys(OMNI, 0)
    for name, p in module.named_parameters():
        size[part_of(module, name)] += p.numel()
    freeze(module, ["audio"])
    said = what_trains(module)
    assert f"audio 0 trained, {size['audio']:,} frozen" in said
    assert f"projector {size['projector']:,} trained, 0 frozen" in said
    _, wrapped = adapted(module, "model.lora_r=2")
    said = what_trains(wrapped)
    factors = sum(p.numel() for p in wrapped.parameters() if p.requires_grad)
    assert said.startswith("parameters (LoRA):")
    assert f"language {factors:,} trained, {size['language']:,} frozen" in said


def test_an_adapter_is_in_the_decoder_unless_said_otherwise(family):
    module = build(FAMILIES[family])
    inside = set(module.get_decoder().modules())
    wanted = {n for n, m in module.named_modules() if isinstance(m, nn.Linear) and m in inside}
    found, _ = adapted(module)
    assert found == wanted and len(found) >= 8


@pytest.mark.parametrize("vision", ["[proj]", "all-linear"])
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl", "qwen2_5_omni", "qwen3_omni_moe"])
def test_targets_of_each_part_and_plain_peft_finds_the_same(family, vision, tmp_path):
    """Also of more than twenty layers, which peft writes down in other words."""
    from peft import PeftModel

    module = build(FAMILIES[family])
    names = {n for n, m in module.named_modules() if isinstance(m, nn.Linear) and n != "lm_head"}
    ends = "" if vision == "all-linear" else ".proj"
    wanted = {n for n in names if part_of(module, n) == "vision" and n.endswith(ends)}
    wanted |= {n for n in names if part_of(module, n) in ("projector", "language")}
    found, wrapped = adapted(
        module, f"model.lora_targets={{vision: {vision}, projector: all-linear, language: all-linear}}"
    )
    assert found == wanted and (len(wanted) > 20 or vision == "[proj]")
    wrapped.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(build(FAMILIES[family]), tmp_path).get_base_model()
    assert {n for n, m in again.named_modules() if hasattr(m, "lora_A")} == wanted


def test_a_frozen_module_gets_no_adapter():
    module = build(FAMILIES["qwen2_5_omni"])
    freeze(module, ["model.layers.0", "visual.blocks"])
    found, _ = adapted(module)
    assert found and all(name.startswith("model.layers.1.") for name in found)
    module = build(FAMILIES["qwen2_5_omni"])
    freeze(module, ["vision"])
    with pytest.raises(InputError, match=r"model\.lora_targets.*layers of vision that model\.freeze does not hold"):
        adapted(module, "model.lora_targets={vision: all-linear}")


@pytest.mark.parametrize(
    ("family", "targets", "expected"),
    [
        ("llama", "{vision: all-linear}", r"a part of LlamaForCausalLM \(language\); found 'vision'"),
        ("llama", "[nothing]", r"linear layers in language \(down_proj, .*\); found 'nothing'"),
        ("llama", "[q_proj, lm_head]", "no adapter on the output head"),
        ("llama", "[mlp]", r"'mlp', which is LlamaMLP"),
        ("llama", "{}", "linear layers for an adapter"),
        ("qwen2_5_omni", "{audio: [qkv]}", r"linear layers in audio \(fc1, "),
        ("qwen3_omni_moe", "[experts]", r"'experts', which is Qwen3OmniMoeThinkerTextExperts"),
    ],
    ids=str,
)
def test_targets_that_match_nothing_or_no_linear_layer_are_refused(family, targets, expected):
    with pytest.raises(InputError, match=expected):
        adapted(build(FAMILIES[family]), f"model.lora_targets={targets}")


@pytest.mark.parametrize("value", ["{hearing: all-linear}", "{vision: some}", "3"])
def test_a_setting_of_another_form_is_refused(value):
    with pytest.raises(InputError, match=r"model\.lora_targets"):
        model_config(f"model.lora_targets={value}")


def test_fused_experts_are_said_to_have_no_adapter(caplog, monkeypatch):
    monkeypatch.setattr(say, "_said", set())
    module = build(FAMILIES["qwen3_omni_moe"])
    experts = sum(p.numel() for n, p in module.named_parameters() if "experts" in n)
    with caplog.at_level("INFO", logger="opsd"):
        found, _ = adapted(module)
        adapted(build(FAMILIES["llama"]))
    assert [record.message for record in caplog.records] == [
        f"no adapter on the experts: they are 3-D parameters ({experts:,}), LoRA adapts linear layers; "
        "model.adapter=none trains them"
    ]
    assert found and not any("experts" in name for name in found)


def test_an_adapter_in_a_tower_is_trained_and_asked_every_time(tmp_path):
    """Its features are no function of the medium any more: nothing of them is kept."""
    from opsd.features import Towers

    module = build(FAMILIES["qwen2_5_omni"])
    freeze(module, ["vision", "audio", "projector"])
    assert {kind.tower for kind in Towers(module, 1).owners} == {"visual", "audio_tower"}
    _, wrapped = adapted(module, "model.lora_targets={language: all-linear}")
    assert {kind.tower for kind in Towers(wrapped.get_base_model(), 1).owners} == {"visual", "audio_tower"}
    _, wrapped = adapted(build(FAMILIES["qwen2_5_omni"]), "model.lora_targets={vision: all-linear}")
    assert {kind.tower for kind in Towers(wrapped.get_base_model(), 1).owners} == {"audio_tower"}
    assert torch.is_grad_enabled()
