"""Each family on the packed engine against its own plain forward, fp64: states, divergences, every gradient."""

from __future__ import annotations

import json
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file

from opsd import fused_token_kl
from opsd.attention_kernels import CPU_FLASH, DENSE
from opsd.config import load_config
from opsd.engine import prefill, response_hidden
from opsd.errors import InputError
from opsd.families import PACKED, install
from opsd.loading import load_model
from opsd.prompts import Prompt
from opsd.responses import Responses
from tests.families import FAMILIES, IMAGE, TOKENIZER, Builder, Double, build, prompts

# G = 1 with nothing, one token, some; G = 8 ragged, with an empty response and one that ends at once.
RECOMPUTED = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Double())}  # backward leaves the mode
GROUPS = {1: (0, 1, 6), 8: (3, 1, 5, 0, 2, 7, 1, 4)}


def open_model(folder, monkeypatch, *words):
    monkeypatch.setattr("opsd.processing.load_processor", lambda *a, **k: TOKENIZER)
    monkeypatch.setattr("opsd.processing.read_processor_files", lambda *a, **k: {})
    config = load_config(None, [f"model.path={folder}", *words])
    model = load_model(config.model, engine=config.engine)
    if model.has_adapter:
        with torch.no_grad():
            torch.manual_seed(5)
            for name, p in model.module.named_parameters():
                if "lora_B" in name:
                    p.normal_(std=0.2)
    model.module.double()
    model.module.get_decoder().config._experts_implementation = "eager"  # grouped GEMMs have no fp64
    return model


@pytest.fixture(scope="module", params=FAMILIES.values(), ids=lambda family: family.name)
def family(request):
    return request.param


@pytest.fixture(scope="module")
def models(family, tmp_path_factory):
    """The model loaded as a run loads it, without and with an adapter."""
    folder = tmp_path_factory.mktemp(family.name)
    build(family).save_pretrained(folder)
    # Without the feature cache, which runs sounds one at a time: transformers pads a sound of under a second as far as
    # the longest of its batch, and Qwen3-Omni's convolutions see the padding.
    alike = "engine.feature_cache_mib=0"
    with pytest.MonkeyPatch.context() as patch:
        return {kind: open_model(folder, patch, f"model.adapter={kind}", alike) for kind in ("none", "lora")}


def responses_of(model, n_prompts, per_prompt):
    generator = torch.Generator().manual_seed(1)
    cycle = GROUPS[per_prompt]
    lengths = [cycle[(i + i // per_prompt) % len(cycle)] for i in range(n_prompts * per_prompt)]
    tokens = [torch.randint(4, 45, (n,), generator=generator).tolist() for n in lengths]
    return Responses.pack(tokens, per_prompt, model.pad_id, model.device)


def divergence(student, teacher, head):
    """(N,) reverse KL in fp64, the definition."""
    p, q = ((x @ head.T).log_softmax(-1) for x in (student, teacher))
    return (p.exp() * (p - q)).sum(-1)


def run(model, family, per_prompt, shared, train=False):
    """States, divergences against the teacher's view, and gradients by name."""
    student, teacher = prompts(family), prompts(family, rationale=4)
    responses = responses_of(model, len(student), per_prompt)
    model.module.zero_grad()
    with Double():
        with torch.no_grad():
            target = response_hidden(model, teacher, responses, shared)
        with model.mode(train):
            hidden = response_hidden(model, student, responses, shared)
            values = divergence(hidden, target, model.head.weight)
            values.sum().backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in model.trainable().items()}
    return hidden.detach(), target, values.detach(), grads


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("per_prompt", GROUPS)
@pytest.mark.parametrize("adapter", ["none", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_shared_prompts_change_nothing(models, family, adapter, per_prompt, checkpointing):
    model = models[adapter]
    plain = models.setdefault(("plain", adapter, per_prompt), None) or run(model, family, per_prompt, shared=False)
    models["plain", adapter, per_prompt] = plain
    if checkpointing:
        model.module.gradient_checkpointing_enable(gradient_checkpointing_kwargs=RECOMPUTED)
    try:
        packed = run(model, family, per_prompt, shared=True, train=checkpointing)
    finally:
        model.module.gradient_checkpointing_disable()
    for name, mine, theirs in zip(("student", "teacher", "divergence"), packed, plain, strict=False):
        assert mine.dtype == torch.float64 and len(mine) == sum(responses_of(model, 3, per_prompt).lengths)
        assert relative(mine, theirs) < 1e-9, name
    biggest = max(grad.norm() for grad in plain[3].values())
    moved = 0
    for name, grad in plain[3].items():
        error = (packed[3][name] - grad).norm()
        assert error < 1e-9 * grad.norm() + 1e-12 * biggest, (name, error.item(), grad.norm().item())
        moved += bool(grad.norm() > 1e-6 * biggest)
    assert moved > 0.8 * len(plain[3]), "most gradients would be equal because they vanish"
    hidden, target, values, _ = packed
    fused = fused_token_kl(hidden.float(), model.head.weight.detach().float(), target.float())
    torch.testing.assert_close(fused.double(), values, rtol=1e-4, atol=1e-5)


def test_positions_are_those_the_model_counts(models, family):
    """Text, images of several shapes, sounds, videos: each prompt alone, and where its responses go on."""
    model = models["none"]
    views = [*prompts(family), *prompts(family, rationale=3)]
    if "audio" in family.media:
        views.append(Builder(family, 7).text(2).sound(44).text(3).prompt())
    for prompt in views:
        own = model.positions(prompt)
        assert own.shape == (family.axes, prompt.length)
        with Double():
            seen = model.forward(**prompt.inputs).positions
            (stored,) = prefill(model, [prompt])
        counted = torch.arange(prompt.length)[None] if seen is None else seen[:, 0]
        assert torch.equal(own.double(), counted.expand_as(own).double())
        assert stored.next_position == counted.max().item() + 1


def test_every_listed_family_is_compared():
    assert {one.config()[1].get_text_config().model_type for one in FAMILIES.values()} == set(PACKED)


SMALL = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "vocab_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
MOE = {"num_local_experts": 2, "num_experts_per_tok": 1}
REFUSED = {
    "MambaConfig": ("state from token to token", {"hidden_size": 16, "num_hidden_layers": 1, "vocab_size": 32}),
    "Qwen3NextConfig": ("state from token to token", {**SMALL, "num_hidden_layers": 4, "num_experts": 2}),
    "GptOssConfig": ("sinks", {**SMALL, **MOE, "head_dim": 8}),
    "Gemma2Config": ("softcap", {**SMALL, "head_dim": 8}),
    "Llama4TextConfig": ("chunked_attention", {**SMALL, "num_local_experts": 2, "intermediate_size_mlp": 16}),
    "MistralConfig": ("nobody has compared", SMALL),
    "LlamaConfig": ("dropout", {**SMALL, "attention_dropout": 0.1}),
    "Gemma3TextConfig": ("not causal", {**SMALL, "head_dim": 8, "use_bidirectional_attention": True}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_families_are_refused_by_name_with_the_reason(name):
    import transformers

    reason, settings = REFUSED[name]
    with torch.device("meta"):
        module = transformers.AutoModelForCausalLM.from_config(getattr(transformers, name)(**settings))
    with pytest.raises(InputError, match=rf"model\.path.*llama, qwen2.*found {type(module).__name__}: .*{reason}"):
        install(module)


def test_encoder_decoders_are_refused(tmp_path):
    from transformers import T5Config

    T5Config(architectures=["T5ForConditionalGeneration"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"decoder architecture.*T5ForConditionalGeneration"):
        load_model(load_config(None, [f"model.path={tmp_path}"]).model)


WHOLE = {
    "qwen2_5_omni": "Qwen2_5OmniForConditionalGeneration",
    "qwen3_omni_moe": "Qwen3OmniMoeForConditionalGeneration",
}


@pytest.mark.parametrize("name", WHOLE)
def test_a_whole_omni_checkpoint_is_opened_as_its_thinker(name, tmp_path, monkeypatch):
    module = build(FAMILIES[name])
    module.save_pretrained(tmp_path / "thinker")
    config = {"architectures": [WHOLE[name]], "model_type": name, "thinker_config": module.config.to_dict()}
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights = load_file(tmp_path / "thinker" / "model.safetensors")
    save_file({f"thinker.{n}": w for n, w in weights.items()}, tmp_path / "model.safetensors", {"format": "pt"})
    found = open_model(tmp_path, monkeypatch).module
    assert type(found) is type(module)
    assert all(torch.equal(p.float(), q) for p, q in zip(found.parameters(), module.parameters(), strict=True))


def test_gemma3_with_a_tower_takes_text_and_refuses_images(tmp_path, monkeypatch):
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tower = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    decoder = FAMILIES["gemma3"].config()[1]
    decoder.final_logit_softcapping = None  # this class does not read it, which the loader would refuse
    config = Gemma3Config(
        text_config=decoder, vision_config={**tower, "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1, image_token_index=IMAGE,
    )  # fmt: skip
    torch.manual_seed(0)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    model = open_model(tmp_path, monkeypatch)
    views = prompts(FAMILIES["gemma3"])
    views = [Prompt({**p.inputs, "token_type_ids": torch.zeros_like(p.inputs["input_ids"])}, "") for p in views]
    responses = responses_of(model, len(views), 8)
    with Double(), torch.no_grad():
        packed, plain = (response_hidden(model, views, responses, shared) for shared in (True, False))
    assert relative(packed, plain) < 1e-9
    with pytest.raises(InputError, match="text only for Gemma3ForConditionalGeneration"):
        prefill(model, [Prompt({**views[0].inputs, "pixel_values": torch.zeros(1, 3, 16, 16)}, "")])


@pytest.mark.parametrize("choice", ["dense", "flash"])
def test_the_attention_of_the_config_is_the_one_that_runs(choice, tmp_path, monkeypatch):
    build(FAMILIES["llama"]).save_pretrained(tmp_path)
    model = open_model(tmp_path, monkeypatch, f"engine.attention={choice}")
    ran = []
    for kernel in (CPU_FLASH, DENSE):
        forward = type(kernel).forward
        monkeypatch.setattr(type(kernel), "forward", lambda *a, forward=forward: ran.append(a[0].name) or forward(*a))
    with Double():
        prefill(model, prompts(FAMILIES["llama"]))
    assert set(ran) == {{"dense": "dense", "flash": "cpu_flash"}[choice]}


def test_an_attention_that_cannot_work_is_told_when_the_model_is_loaded(tmp_path, monkeypatch):
    build(FAMILIES["llama"]).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"engine\.attention"):
        open_model(tmp_path, monkeypatch, "engine.attention=flash_attn")
