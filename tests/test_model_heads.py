"""Heads with a bias, a scale or a softcap: what is drawn, scored and trained is the distribution of the plain model."""

from __future__ import annotations

import pytest
import torch

from opsd.config import ObjectiveConfig
from opsd.engine import response_hidden
from opsd.objectives.distill import distill_loss
from opsd.objectives.logprobs import token_logprobs
from opsd.rollout import rollout
from opsd.sampling import Sampling
from opsd_kernels import Head
from tests.families import FAMILIES, build, prompts
from tests.test_families import open_model

# What the head has beside its weight. Cohere and Gemma tie it to the embeddings.
HEADS = {"gemma3": {"softcap": 4.0}, "granite": {"scale": 2.0}, "cohere": {"scale": 0.3}, "phi": {}}


@pytest.fixture(scope="module", params=HEADS)
def setting(request, tmp_path_factory):
    family, folder = FAMILIES[request.param], tmp_path_factory.mktemp(request.param)
    build(family).save_pretrained(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("opsd.model.LanguageModel.suppressed_ids", [0])
        model = open_model(folder, patch)
        model.module.float()
        yield request.param, model, prompts(family), prompts(family, rationale=3, seed=9)


def plain_logits(model, prompt, tokens):
    """(T, V) of the model called as anybody calls it, in fp64 after its own fp32 forward."""
    ids = torch.cat([prompt.inputs["input_ids"], tokens[None]], 1)
    return model.module(input_ids=ids).logits[0, prompt.length - 1 : -1].double()


def dense(model, views, out):
    rows = zip(out.tokens, out.lengths, out.owners, strict=True)
    return torch.cat([plain_logits(model, views[owner], row[:n]) for row, n, owner in rows])


def test_the_head_is_read_from_the_family(setting):
    name, model, _, _ = setting
    head, wanted = model.head, {"scale": 1.0, "softcap": None} | HEADS[name]
    assert {"scale": head.scale, "softcap": head.softcap} == wanted
    assert (head.bias is not None) == (name == "phi")


def test_a_response_is_drawn_from_the_plain_models_distribution(setting):
    _, model, views, _ = setting
    out = rollout(model, views, Sampling(3, 7), [4, 5, 6])
    whole = dense(model, views, out).detach().log_softmax(-1)  # of the whole vocabulary, token 0 too
    got = out.logprobs.flatten().index_select(0, out.packed_index)
    torch.testing.assert_close(got.double(), whole.gather(1, out.packed_tokens[:, None])[:, 0], rtol=1e-4, atol=1e-4)
    greedy = rollout(model, views, Sampling.greedy(5), [0] * len(views))
    likeliest = dense(model, views, greedy).detach()
    likeliest[:, 0] = -torch.inf  # suppressed
    assert torch.equal(likeliest.argmax(-1), greedy.packed_tokens)


@pytest.mark.parametrize("kind", ["logprobs", "jsd"])
def test_losses_and_gradients_are_those_of_the_plain_models_logits(setting, kind):
    """Of every parameter, the head's bias among them; the logits of the dense loss are the model's own."""
    _, model, views, taught = setting
    out = rollout(model, views, Sampling(3, 7), [4, 5, 6])
    n = len(out.packed_tokens)
    weights = torch.rand(n, generator=torch.Generator().manual_seed(2)) + 0.5
    with torch.no_grad():
        target = response_hidden(model, taught, out)
        q = dense(model, taught, out).log_softmax(-1)

    def ours():
        hidden = response_hidden(model, views, out)
        if kind == "logprobs":
            return (weights * token_logprobs(hidden, model.head, out.packed_tokens, workspace_mib=1)).sum()
        return distill_loss(hidden, model.head, target, None, weights, ObjectiveConfig())[0]

    def truth():
        p = dense(model, views, out).log_softmax(-1)
        if kind == "logprobs":
            return (weights.double() * p.gather(1, out.packed_tokens[:, None])[:, 0]).sum()
        m = (p.exp() + q.exp()).log() - torch.tensor(2.0).double().log()
        return (weights[:, None] * (0.5 * p.exp() * (p - m) + 0.5 * q.exp() * (q - m))).sum()

    found, wanted = (differentiate(model, loss) for loss in (ours, truth))
    torch.testing.assert_close(found[0].double(), wanted[0].double(), rtol=1e-5, atol=1e-6)
    assert any(name.startswith("lm_head") or "embed" in name for name in wanted[1])
    largest = max(grad.norm() for grad in wanted[1].values())
    for name, grad in wanted[1].items():
        assert (found[1][name] - grad).norm() <= 1e-4 * grad.norm() + 1e-6 * largest, name


def differentiate(model, loss):
    model.module.zero_grad()
    value = loss()
    value.backward()
    return value.detach(), {n: p.grad.clone() for n, p in model.trainable().items() if p.grad is not None}


def test_logprobs_through_a_bent_head_in_chunks_equal_fp64():
    torch.manual_seed(0)
    leaves = [torch.randn(40, 8), torch.randn(5000, 8), torch.randn(5000)]
    tokens = torch.randint(5000, (40,))
    hidden, weight, bias = (x.clone().requires_grad_() for x in leaves)
    got = token_logprobs(hidden, Head(weight, bias, 0.5, 3.0), tokens, workspace_mib=1)
    got.sum().backward()
    h, w, b = (x.double().requires_grad_() for x in leaves)
    want = (3.0 * torch.tanh(0.5 * (h @ w.T + b) / 3.0)).log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    want.sum().backward()
    for ours, truth in ((got, want), (hidden.grad, h.grad), (weight.grad, w.grad), (bias.grad, b.grad)):
        assert (ours - truth).norm() < 1e-5 * truth.norm()
