"""Logits of half models are exact products; what is sampled is what is scored."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from opsd import say
from opsd.data import read_examples
from opsd.engine import response_hidden
from opsd.families import _rope_types
from opsd.graphs import obstacle
from opsd.loading import load_model
from opsd.logits import logits_of
from opsd.objectives.logprobs import token_logprobs
from opsd.prompts import PromptBuilder
from opsd.rollout import rollout
from opsd.sampling import Sampling
from tests.jobs import text_job

BF16 = torch.bfloat16


def relative(a, b):
    return ((a - b).double().norm() / b.double().norm()).item()


@pytest.mark.parametrize("head_dtype, hidden_dtype", [(BF16, BF16), (torch.float32, BF16), (torch.float32,) * 2])
def test_logprobs_and_their_gradients_equal_fp64(head_dtype, hidden_dtype):
    """Of a head in the dtype of the hidden states, whatever dtype it is kept in; in several chunks."""
    torch.manual_seed(0)
    head = torch.randn(5000, 16).to(head_dtype).requires_grad_()
    hidden, tokens = torch.randn(70, 16).to(hidden_dtype).requires_grad_(), torch.randint(5000, (70,))
    got = token_logprobs(hidden, head, tokens, workspace_mib=1)
    got.sum().backward()
    wide, wide_head = hidden.detach().double().requires_grad_(), head.detach().to(hidden_dtype).double()
    wide_head.requires_grad_()
    want = (wide @ wide_head.T).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    want.sum().backward()
    assert relative(got, want) < 1e-6  # rounded to bf16 the logits alone would be 2e-3 away
    limit = 1e-5 if hidden_dtype == torch.float32 else 4e-3  # a gradient has the dtype of what it is of
    assert relative(hidden.grad, wide.grad) < limit
    assert relative(head.grad, wide_head.grad) < limit
    assert head.grad.dtype == head_dtype


def test_no_tokens_have_no_logprobs_and_a_zero_gradient():
    head, hidden = torch.randn(9, 4, requires_grad=True), torch.randn(0, 4, requires_grad=True)
    token_logprobs(hidden, head, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert head.grad.abs().sum() == 0 and hidden.grad.shape == (0, 4)


def test_logits_of_a_half_head_are_exact():
    torch.manual_seed(0)
    hidden, head = torch.randn(3, 64).to(BF16), torch.randn(500, 64).to(BF16)
    assert relative(logits_of(hidden, head), hidden.double() @ head.double().T) < 1e-6


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_bf16_response_is_scored_as_it_was_drawn(tmp_path, adapter):
    """Only the hidden states differ, in their last bits: the importance ratio of a fresh response is 1."""
    config = text_job(tmp_path, "model.dtype=bfloat16", f"model.adapter={adapter}")
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    prompts = [builder.student(e) for e in read_examples(config.data.train, config.data)]
    out = rollout(model, prompts, Sampling(4, 8), list(range(len(prompts))))
    with torch.no_grad():
        hidden = response_hidden(model, prompts, out)
        want = token_logprobs(hidden, model.head, out.packed_tokens)
    got = out.logprobs.flatten().index_select(0, out.packed_index)
    first = torch.tensor([0, *out.lengths[:-1]]).cumsum(0)  # of each response: its state comes from the same pass
    torch.testing.assert_close(got[first], want[first], rtol=1e-5, atol=1e-5)
    assert (got - want).abs().median() < 0.02


def test_experts_that_ask_the_host_are_not_captured():
    def decoder(**config):
        return SimpleNamespace(config=SimpleNamespace(**config))

    grouped = decoder(num_experts=8, _experts_implementation="grouped_mm")
    assert obstacle(decoder(), False, (8, 0)) is None
    assert obstacle(grouped, True, (9, 0)) is None
    assert obstacle(grouped, False, (9, 0)) and obstacle(grouped, True, (8, 0))
    assert obstacle(decoder(num_experts=8, _experts_implementation="eager"), True, (9, 0))


def test_rope_types_of_one_set_of_parameters_and_of_one_for_each_kind_of_layer():
    kinds = {"sliding_attention": {"rope_type": "default"}, "full_attention": {"rope_type": "dynamic"}}
    assert _rope_types(SimpleNamespace(rope_parameters={"rope_type": "longrope", "factor": 2.0})) == {"longrope"}
    assert _rope_types(SimpleNamespace(rope_parameters=kinds)) == {"default", "dynamic"}
    assert _rope_types(SimpleNamespace()) == set()


def test_a_choice_is_said_once(caplog, monkeypatch):
    monkeypatch.setattr(say, "_said", set())
    with caplog.at_level("INFO", logger="opsd"):
        for _ in range(3):
            say.say_once("kernels of one kind")
    assert [record.message for record in caplog.records] == ["kernels of one kind"]
