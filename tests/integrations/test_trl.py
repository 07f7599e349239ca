"""FusedDivergence and FusedLossMixin against TRL itself: same arguments, same numbers, same training step."""

from __future__ import annotations

import inspect
from pathlib import Path

import pytest
import torch

from opsd.integrations.trl import FusedDivergence, FusedLossMixin
from tests.models import save_text_model

pytest.importorskip("trl", reason="trl is not installed (the extra `peers`)")
pytestmark = pytest.mark.filterwarnings("ignore")
ROWS = [
    {"prompt": "the clip shows a sad face", "privileged_context": "low voice is sad"},
    {"prompt": "a high voice", "privileged_context": "the face is happy and the voice is high : happy"},
]


def operands(shared: bool):
    g = torch.Generator().manual_seed(0)
    student = torch.randn(19, 16, generator=g, requires_grad=True)
    head = (torch.randn(130, 16, generator=g) / 2).requires_grad_()
    teacher = student.detach() + 0.3 * torch.randn(19, 16, generator=g)
    other = head if shared else torch.randn(130, 16, generator=g) / 2
    bias = torch.randn(2, 130, generator=g)
    return student, head, bias[0].clone().requires_grad_(), teacher, other, bias[0 if shared else 1]


@pytest.mark.parametrize("changes", [(), (0.7, None, 0.7, None), (1.5, 4.0, 0.7, 8.0)])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_divergence_entropy_and_gradients(beta, shared, changes):
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    results = []
    for function in (ChunkedDivergenceFunction, FusedDivergence):
        inputs = operands(shared)
        value, entropy = function.apply(*inputs, beta, 1.3, *changes)
        assert not entropy.requires_grad
        (value * torch.linspace(0, 2, len(value))).sum().backward()
        results.append((value, entropy, inputs[0].grad, inputs[1].grad, inputs[2].grad))
    torch.testing.assert_close(*results, rtol=1e-4, atol=2e-6)


def test_arguments_are_those_of_the_library():
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction

    theirs = list(inspect.signature(ChunkedDivergenceFunction.forward).parameters.values())[1:]
    ours = list(inspect.signature(FusedDivergence.apply).parameters.values())
    assert [(p.name, p.default) for p in ours] == [(p.name, p.default) for p in theirs]


def trainer(cls, folder: Path, lora: bool, **changes):
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, LlamaForCausalLM
    from trl.experimental.sdft import SDFTConfig

    settings = {
        "distillation_mode": "full_logits",
        "num_generations": 2,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 1,
        "max_completion_length": 6,
        "max_steps": 2,
        "logging_steps": 1,
        "learning_rate": 1e-2,
        "temperature": 1.2,
    }
    config = SDFTConfig(
        output_dir=str(folder / cls.__name__), report_to="none", use_cpu=True, bf16=False, **settings | changes
    )
    model = LlamaForCausalLM.from_pretrained(folder / "model")
    peft = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False) if lora else None
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return cls(model, args=config, train_dataset=Dataset.from_list(ROWS), processing_class=tokenizer, peft_config=peft)


def classes():
    from trl.experimental.sdft import SDFTTrainer

    return SDFTTrainer, type("FusedSDFTTrainer", (FusedLossMixin, SDFTTrainer), {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("trl")
    save_text_model(path / "model", tied=False)
    return path


@pytest.mark.parametrize("alpha, clip, lora", [(0.5, 1.1, False), (1.0, None, True), (0.0, 1.1, True)])
def test_loss_and_gradients_of_a_batch_equal_those_of_sdft(folder, alpha, clip, lora):
    results = []
    for cls in classes():
        it = trainer(cls, folder, lora, distillation_alpha=alpha, distillation_is_clip=clip, num_loss_tokens_to_skip=1)
        g = torch.Generator().manual_seed(0)
        ids = torch.randint(4, 23, (2, 12), generator=g)
        mask = torch.ones(2, 5, dtype=torch.long)
        mask[1, 3:] = 0
        batch = {
            "prompt_ids": ids[:, :4],
            "prompt_mask": torch.ones(2, 4, dtype=torch.long),
            "completion_ids": ids[:, 7:],
            "completion_mask": mask,
            "teacher_input_ids": torch.cat([ids[:, :7].flip(1), ids[:, 7:]], dim=1),
            "teacher_attention_mask": torch.cat([torch.ones(2, 7, dtype=torch.long), mask], dim=1),
            "old_per_token_logps": -3 - torch.rand(2, 5, generator=g),
        }
        it.model.train()
        it.current_gradient_accumulation_steps = 1
        loss = it.compute_loss(it.model, batch)
        loss.backward()
        metric = it._metrics["train"]
        grads = {n: p.grad for n, p in it.model.named_parameters() if p.grad is not None}
        results.append((loss, {k: v for k, v in metric.items() if "distill" in k}, grads))
    (loss, metric, grads), (ours, our_metric, our_grads) = results
    assert loss > 0 and metric and grads
    torch.testing.assert_close(ours, loss, rtol=1e-5, atol=1e-7)
    assert our_metric.keys() == metric.keys()
    for name, values in metric.items():
        assert our_metric[name] == pytest.approx(values, rel=1e-5)
    assert our_grads.keys() == grads.keys()
    for name, gradient in grads.items():
        torch.testing.assert_close(our_grads[name], gradient, rtol=1e-3, atol=1e-6)


def test_training_takes_the_same_steps_and_forms_no_logits(folder):
    losses, formed = [], []
    for cls in classes():
        it = trainer(cls, folder, lora=False)
        sizes = []

        def note(module, args, out, sizes=sizes):
            if torch.is_grad_enabled():
                sizes.append(out.numel())

        it.model.lm_head.register_forward_hook(note)
        it.train()
        losses.append([entry["loss"] for entry in it.state.log_history if "loss" in entry])
        formed.append(any(sizes))
    assert formed == [True, False]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 2


def test_other_modes_stay_those_of_trl(folder):
    it = trainer(classes()[1], folder, lora=False, distillation_mode="topk_logits", distillation_topk=5, max_steps=1)
    it.train()
    assert any("loss" in entry for entry in it.state.log_history)
