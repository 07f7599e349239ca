"""Each family on the packed engine against its own plain forward, fp64: states, divergences, every gradient."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch

from opsd import fused_token_kl
from opsd.config import load_config
from opsd.engine import response_hidden
from opsd.families import PACKED
from opsd.model import load_model
from opsd.responses import Responses
from tests.families import FAMILIES, TOKENIZER, Double, build, prompts

# G = 1 with nothing, one token, some; G = 8 ragged, with an empty response and one that ends at once.
RECOMPUTED = {"use_reentrant": False, "context_fn": lambda: (nullcontext(), Double())}  # backward leaves the mode
GROUPS = {1: (0, 1, 6), 8: (3, 1, 5, 0, 2, 7, 1, 4)}


def open_model(folder, monkeypatch, *words):
    monkeypatch.setattr("opsd.processing.load_processor", lambda *a, **k: TOKENIZER)
    monkeypatch.setattr("opsd.model.read_processor_files", lambda *a, **k: {}, raising=False)
    monkeypatch.setattr("opsd.processing.read_processor_files", lambda *a, **k: {})
    model = load_model(load_config(None, [f"model.path={folder}", *words]).model)
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
    with pytest.MonkeyPatch.context() as patch:
        return {kind: open_model(folder, patch, f"model.adapter={kind}") for kind in ("none", "lora")}


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
            values = divergence(hidden, target, model.head)
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
    fused = fused_token_kl(hidden.float(), model.head.detach().float(), target.float())
    torch.testing.assert_close(fused.double(), values, rtol=1e-4, atol=1e-5)


def test_every_listed_family_is_compared():
    decoders = set()
    for one in FAMILIES.values():
        decoders.add(one.config()[1].get_text_config().model_type)
    assert decoders == set(PACKED)
