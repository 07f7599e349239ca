"""Hidden states and the loss against the logits that the real models give."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from opsd.integrations.hf import distillation_loss, hidden_states, logit_changes, output_head
from opsd_kernels import Divergence
from opsd_kernels.reference import token_divergence

V, S = 40, 9
SIZES = {
    "vocab_size": V,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}

FALCON = {"num_key_value_heads": 2, "mamba_d_ssm": 16, "mamba_n_heads": 2}


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.3, **changes))


def gemma(softcap):
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=8, num_key_value_heads=1, final_logit_softcapping=softcap))


def biased(model):
    head = torch.nn.Linear(16, V, bias=True)
    torch.nn.init.normal_(head.bias)
    model.set_output_embeddings(head)
    return model


def family(name, **changes):
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, initializer_range=0.3, pad_token_id=0, **changes)
    return getattr(transformers, f"{name}ForCausalLM")(config)


def logits_of(hidden, head):
    z = torch.nn.functional.linear(hidden, head.weight, head.bias) * head.scale
    return z if head.softcap is None else head.softcap * torch.tanh(z / head.softcap)


def lora(model, **changes):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", **changes)
    wrapped = get_peft_model(model, config)
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:  # a fresh adapter changes nothing, which would hide mistakes
            parameter.data += 0.3 * torch.randn(parameter.shape)
    return wrapped


def batch(prompt: int, seed: int = 0):
    """Two prompts of `prompt` tokens and the same two responses of 5 and 3 tokens, right-padded."""
    g = torch.Generator().manual_seed(3)
    responses = torch.randint(V, (2, 5), generator=g)
    prompts = torch.randint(V, (2, prompt), generator=torch.Generator().manual_seed(seed))
    ids = torch.cat([prompts, responses], dim=1)
    attention, mask = torch.ones_like(ids), torch.zeros_like(ids)
    mask[:, prompt:] = 1
    attention[1, -2:] = mask[1, -2:] = 0
    return {"input_ids": ids, "attention_mask": attention}, mask.bool()


MODELS = {
    "llama": llama,
    "tied": lambda: llama(tie_word_embeddings=True),
    "gemma without softcap": lambda: gemma(None),
    "softcap": lambda: gemma(2.0),
    "bias": lambda: biased(llama()),
    "cohere multiplies": lambda: family("Cohere", logit_scale=0.25),
    "granite divides": lambda: family("Granite", logits_scaling=3.0),
    "falcon multiplies": lambda: family(
        "FalconH1", num_key_value_heads=2, lm_head_multiplier=0.5, mamba_d_ssm=16, mamba_n_heads=2
    ),
    "minicpm scales before the head": lambda: family("MiniCPM3", dim_model_base=4),
    "lora": lambda: lora(llama()),
    "trained head": lambda: lora(llama(), modules_to_save=["lm_head"]),
}


@pytest.mark.parametrize("name", MODELS)
def test_hidden_states_times_head_are_the_logits_and_the_head_is_not_run(name):
    model = MODELS[name]().eval()
    inputs, _ = batch(prompt=4)
    sizes = []
    hook = model.get_output_embeddings().register_forward_hook(lambda module, args, out: sizes.append(out.numel()))
    hidden = hidden_states(model, **inputs)
    hook.remove()
    assert sizes == [0]
    torch.testing.assert_close(logits_of(hidden, output_head(model)), model(**inputs).logits, atol=1e-5, rtol=1e-5)
    assert hidden_states(model, **inputs, logits_to_keep=3).shape == (2, 3, 16)
    assert model(**inputs).logits.shape == (2, S, V), "the hook is gone"


@pytest.mark.parametrize("name", MODELS)
def test_loss_and_gradients_equal_those_of_full_logits(name):
    model = MODELS[name]().train()
    (inputs, mask), (teacher_inputs, teacher_mask) = batch(prompt=4), batch(prompt=7, seed=1)
    divergence = Divergence("jsd", beta=0.3)

    loss = distillation_loss(model, inputs, mask, teacher_inputs, teacher_mask, divergence=divergence)
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    with torch.no_grad(), model.disable_adapter() if hasattr(model, "peft_config") else nullcontext():
        z_t = model(**teacher_inputs).logits
    z_s = model(**inputs).logits[:, :-1][mask[:, 1:]]
    truth = token_divergence(z_s, z_t[:, :-1][teacher_mask[:, 1:]], divergence).mean()
    truth.backward()
    torch.testing.assert_close(loss, truth, atol=1e-6, rtol=1e-5)
    wanted = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys() and wanted
    for key, gradient in wanted.items():
        torch.testing.assert_close(found[key], gradient, atol=1e-6, rtol=1e-4)


def test_another_model_can_teach():
    student, teacher = llama(), gemma(None)
    (inputs, mask), (teacher_inputs, teacher_mask) = batch(prompt=4), batch(prompt=7, seed=1)
    loss = distillation_loss(student, inputs, mask, teacher_inputs, teacher_mask, teacher=teacher)
    loss.backward()
    z_t = teacher(**teacher_inputs).logits[:, :-1][teacher_mask[:, 1:]]
    z_s = student(**inputs).logits[:, :-1][mask[:, 1:]]
    torch.testing.assert_close(loss, token_divergence(z_s, z_t, Divergence()).mean(), atol=1e-6, rtol=1e-5)
    assert all(p.grad is None for p in teacher.parameters())


def test_the_teacher_has_no_dropout_and_leaves_the_mode_as_it_was():
    model = llama(attention_dropout=0.9).train()
    model.model.layers[0].eval()
    modes = [m.training for m in model.modules()]
    inputs, mask = batch(prompt=4)
    seen = []
    hook = model.model.register_forward_pre_hook(lambda module, args: seen.append(module.training))
    distillation_loss(model, inputs, mask, inputs, mask)
    hook.remove()
    assert seen == [False, True]
    assert [m.training for m in model.modules()] == modes


def test_no_response_tokens_give_zero():
    model = llama()
    inputs, mask = batch(prompt=4)
    loss = distillation_loss(model, inputs, mask & False, inputs, mask & False)
    loss.backward()
    assert loss.item() == 0


def test_autocast_takes_its_dtype():
    model = llama()
    (inputs, mask), (teacher_inputs, teacher_mask) = batch(prompt=4), batch(prompt=7, seed=1)
    exact = distillation_loss(model, inputs, mask, teacher_inputs, teacher_mask)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = distillation_loss(model, inputs, mask, teacher_inputs, teacher_mask)
    loss.backward()
    assert loss.dtype == torch.float32 and model.lm_head.weight.grad.dtype == torch.float32
    assert 0 < abs(loss - exact) < 0.05 * exact


def test_what_the_loss_cannot_honour_is_refused():
    assert logit_changes(gemma(30.0)) == {"final_logit_softcapping": 30.0}
    unknown = llama()
    unknown.config.update({"logits_scaling": 2.0})
    assert logit_changes(unknown) == {"logits_scaling": 2.0}
    with pytest.raises(ValueError, match=r"expected a family whose logits_scaling is known.*got LlamaForCausalLM"):
        output_head(unknown)
    from peft import LoraConfig, get_peft_model

    on_head = get_peft_model(llama(), LoraConfig(r=2, target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"plain nn.Linear, got Linear"):
        output_head(on_head)
    inputs, mask = batch(prompt=4)
    with pytest.raises(ValueError, match="without labels"):
        hidden_states(llama(), **inputs, labels=inputs["input_ids"])
    fewer = mask.clone()
    fewer[1] = False
    with pytest.raises(ValueError, match=r"expected masks over the same tokens, got 8 and 5"):
        distillation_loss(llama(), inputs, mask, inputs, fewer)
    with pytest.raises(ValueError, match=r"expected a mask of shape \(2, 9\), got \(2, 8\)"):
        distillation_loss(llama(), inputs, mask[:, 1:], inputs, mask)
    with pytest.raises(ValueError, match="expected the mask as a tensor, got list"):
        distillation_loss(llama(), inputs, mask.tolist(), inputs, mask)
    for found in (None, "llama"):
        with pytest.raises(ValueError, match=f"expected a model of transformers, got {type(found).__name__}"):
            output_head(found)
