"""Shared prefix against plain batches: hidden states and every gradient; packing; 3-axis positions."""

from __future__ import annotations

import pytest
import torch

from opsd.data import read_examples
from opsd.engine import response_hidden
from opsd.loading import load_model
from opsd.packing import Packed, Tree
from opsd.plain import collate
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from tests.jobs import text_job


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = text_job(tmp_path_factory.mktemp("engine"))
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    examples = read_examples(config.data.train, config.data)
    return model, [builder.student(e) for e in examples[:3]]


def responses_of(lengths, per_prompt):
    generator = torch.Generator().manual_seed(0)
    tokens = [torch.randint(4, 20, (n,), generator=generator).tolist() for n in lengths]
    return Responses.pack(tokens, per_prompt, 0, torch.device("cpu"))


def relative(a, b):
    return ((a - b).norm() / b.norm().clamp_min(1e-30)).item()


@pytest.mark.parametrize("per_prompt, lengths", [(1, [3, 1, 7]), (2, [1, 1, 5, 2, 8, 1]), (1, [1, 1, 1])])
def test_shared_prefix_equals_plain_in_hidden_states_and_gradients(setting, per_prompt, lengths):
    model, prompts = setting
    responses = responses_of(lengths, per_prompt)
    module = model.module.double()
    try:
        results = []
        for shared in (True, False):
            module.zero_grad()
            hidden = response_hidden(model, prompts, responses, shared)
            hidden.square().sum().backward()
            results.append((hidden.detach(), {n: p.grad.clone() for n, p in model.trainable().items()}))
    finally:
        module.float()
    (shared_hidden, shared_grads), (plain_hidden, plain_grads) = results
    assert shared_hidden.shape == (sum(lengths), 32)
    # fp64 weights, but the model's RMSNorm and RoPE work in fp32: 1e-6, not 1e-12.
    assert relative(shared_hidden, plain_hidden) < 1e-6
    for name, grad in plain_grads.items():
        assert relative(shared_grads[name], grad) < 1e-6, name


def test_hidden_states_are_those_that_predict_the_response(setting):
    """The dense definition: logits of one whole sequence at positions P-1 .. P+T-2."""
    model, prompts = setting
    responses = responses_of([4, 2, 3], 1)
    hidden = response_hidden(model, prompts, responses)
    row = 0
    for prompt, tokens, length in zip(prompts, responses.tokens, responses.lengths, strict=True):
        whole = torch.cat([prompt.inputs["input_ids"][0], tokens[:length]])[None]
        logits = model.module(input_ids=whole).logits[0, prompt.length - 1 : prompt.length - 1 + length]
        torch.testing.assert_close(hidden[row : row + length] @ model.head.weight.T, logits, rtol=1e-4, atol=1e-4)
        row += length


def test_forward_leaves_no_logits_and_no_hooks(setting):
    model, prompts = setting
    seen = []
    handle = model.module.get_output_embeddings().register_forward_hook(lambda m, a, out: seen.append(out.shape))
    model.forward(**collate(prompts, model.pad_id, model.device))
    handle.remove()
    assert seen[0][1] == 0, "the head ran on tokens"
    assert not model.module.get_output_embeddings()._forward_pre_hooks
    assert not model.module.get_decoder()._forward_pre_hooks


def test_token_weights_make_a_mean_of_means():
    responses = responses_of([2, 200], 1)
    values = torch.cat([torch.full((2,), 3.0), torch.full((200,), 5.0)])
    assert (responses.token_weights * values).sum().item() == pytest.approx(8.0, rel=1e-6)  # one half each, times 2
    assert responses.packed_tokens.tolist()[:2] == responses.tokens[0, :2].tolist()


def test_dropout_of_the_student_survives_the_teacher(setting):
    model, _ = setting
    with model.mode(train=True):
        with model.mode(train=False):
            assert not model.module.training
        assert model.module.training
    assert not model.module.training


def test_tokens_of_a_packed_row_against_those_of_a_padded_batch():
    packed = Packed((Tree(5, (3, 1, 0)), Tree(2, (7,), stored=True), Tree(4)))
    assert packed.length == 5 + 2 + 6 + 4
    assert packed.padded_length == 4 * (2 + 6)  # four responses, each with its prompt, as long as the longest
