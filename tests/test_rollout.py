"""Rollouts: greedy equals generate, a response depends on its seed and not on the batch, log-probs are pi's."""

from __future__ import annotations

import pytest
import torch

import opsd.decode
import opsd.rollout
from opsd.data import read_examples
from opsd.draw import Draw
from opsd.engine import response_hidden
from opsd.errors import InputError
from opsd.fit import Budget
from opsd.loading import load_model
from opsd.objectives.logprobs import token_logprobs
from opsd.prompts import PromptBuilder
from opsd.responses import Responses
from opsd.rollout import Rollouts, decode, rollout
from opsd.sampling import Sampling
from tests.jobs import text_job
from tests.test_sampling import below_one_in_a_thousand, chi_square


@pytest.fixture(scope="module")
def setting(tmp_path_factory):
    config = text_job(tmp_path_factory.mktemp("rollout"))
    model = load_model(config.model)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    return model, [builder.student(e) for e in read_examples(config.data.train, config.data)]


def token_lists(responses: Responses) -> list[list[int]]:
    return [row[:n] for row, n in zip(responses.tokens.tolist(), responses.lengths, strict=True)]


def test_greedy_equals_generate_token_for_token(setting):
    model, prompts = setting
    ours = rollout(model, prompts, Sampling.greedy(12), [0] * len(prompts))
    for prompt, tokens, length in zip(prompts, ours.tokens, ours.lengths, strict=True):
        out = model.module.generate(
            **prompt.inputs, max_new_tokens=12, do_sample=False, suppress_tokens=model.suppressed_ids
        )
        assert tokens[:length].tolist() == out[0, prompt.length :].tolist()


@pytest.mark.parametrize("options", [{}, {"temperature": 0.8, "top_k": 12, "top_p": 0.9, "min_p": 0.02}])
def test_a_response_depends_on_its_seed_and_not_on_the_batch(setting, options):
    model, prompts = setting
    sampling, order = Sampling(3, 8, **options), [2, 0, 3, 1]
    together = token_lists(rollout(model, prompts[:4], sampling, [5, 6, 7, 8]))
    shuffled = token_lists(rollout(model, [prompts[i] for i in order], sampling, [5 + i for i in order]))
    assert shuffled == [together[3 * i + g] for i in order for g in range(3)]
    alone = token_lists(rollout(model, prompts[2:3], sampling, [7]))
    assert alone == together[6:9]
    assert token_lists(rollout(model, prompts[2:3], sampling, [9])) != alone
    fewer = token_lists(rollout(model, prompts[2:3], Sampling(1, 4, **options), [7]))
    assert fewer[0] == alone[0][:4]


def test_special_ids_and_padded_vocabulary_are_never_sampled(setting):
    model, prompts = setting
    assert set(model.suppressed_ids) == {0, 1, 3, *range(len(model.tokenizer), model.head.weight.shape[0])}
    out = rollout(model, prompts, Sampling(16, 8, temperature=5.0), list(range(len(prompts))))
    sampled = out.packed_tokens
    assert not torch.isin(sampled, torch.tensor(model.suppressed_ids)).any()


def test_responses_end_with_the_end_token_or_at_the_limit(setting):
    model, prompts = setting
    out = rollout(model, prompts, Sampling(8, 6), list(range(len(prompts))))
    end = model.end_ids[0]
    assert len(set(out.lengths)) > 1
    for tokens, n in zip(out.tokens.tolist(), out.lengths, strict=True):
        assert (tokens[n - 1] == end) or n == 6
        assert end not in tokens[: n - 1]
        assert all(t == model.pad_id for t in tokens[n:])
    assert all("<end>" not in text for text in decode(model.tokenizer, out))


def test_token_logprobs_equal_log_softmax_at_any_chunk(setting):
    model, _ = setting
    torch.manual_seed(0)
    hidden, tokens = torch.randn(9, 32, requires_grad=True), torch.randint(0, 20, (9,))
    dense = (hidden @ model.head.weight.T).log_softmax(-1)[torch.arange(9), tokens]
    (want,) = torch.autograd.grad(dense.sum(), hidden)
    chunked = token_logprobs(hidden, model.head, tokens, workspace_mib=1)
    (got,) = torch.autograd.grad(chunked.sum(), hidden)
    torch.testing.assert_close(chunked, dense)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("sampling", [Sampling.greedy(9), Sampling(5, 9, temperature=1.3)], ids=["greedy", "sampled"])
def test_slots_and_sharing_change_nothing(setting, sampling):
    """Refilled slots, lanes used again, idle slots dropped, and the plain twin: the same tokens and log-probs."""
    model, prompts = setting
    seeds = list(range(3, 3 + len(prompts)))
    want = rollout(model, prompts, sampling, seeds, share_prefix=False)
    assert len(set(want.lengths)) > 1
    for slots in (1, 3, 4, 64):
        got = rollout(model, prompts, sampling, seeds, slots=slots)
        assert got.lengths == want.lengths and got.owners == want.owners
        assert torch.equal(got.tokens, want.tokens)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-4, atol=1e-4)


def test_columns_that_grow_change_nothing(setting, monkeypatch):
    """Also past idle slots, which wait for company before they are filled again."""
    model, prompts = setting
    seeds, sampling = list(range(len(prompts))), Sampling(6, 12)
    want = rollout(model, prompts, sampling, seeds)
    monkeypatch.setattr(opsd.decode, "_FIRST_COLUMNS", 1)
    for slots in (4, 8, 16):
        got = rollout(model, prompts, sampling, seeds, slots=slots)
        assert max(want.lengths) > 8 and token_lists(got) == token_lists(want)
        torch.testing.assert_close(got.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("share_prefix", [True, False])
def test_any_of_several_end_tokens_ends_a_response(setting, monkeypatch, share_prefix):
    """As chat models have them. The response is that of one end token, up to the first of them all."""
    model, prompts = setting
    seeds, sampling, other = list(range(len(prompts))), Sampling(4, 12), model.tokenizer.convert_tokens_to_ids("high")
    whole = token_lists(rollout(model, prompts, sampling, seeds))
    monkeypatch.setattr(model, "end_ids", [*model.end_ids, other])
    found = token_lists(rollout(model, prompts, sampling, seeds, share_prefix=share_prefix))
    ends = [row.index(other) + 1 if other in row else len(row) for row in whole]
    assert found == [row[:end] for row, end in zip(whole, ends, strict=True)] != whole


def test_a_draw_begins_again_with_nothing_of_the_call_before(setting):
    """On CUDA it serves every call of a run."""
    model, _ = setting
    sampling = Sampling(2, 3, stop=("face",))
    hidden, rows = torch.randn(4, 32, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    used, fresh = Draw(model, sampling, 4), Draw(model, sampling, 4)
    used.reset([1, 2])
    with torch.no_grad():
        for at in range(3):
            used.next(hidden, rows, torch.full_like(rows, at))
    used.cut(range(4))
    assert used.lengths[:4].tolist() == used.checked == [3] * 4
    used.reset([3, 4])
    fresh.reset([3, 4])
    for name in ("tokens", "logprobs", "lengths", "uniform"):
        assert torch.equal(getattr(used, name), getattr(fresh, name)), name
    assert used.checked == fresh.checked


def test_frequencies_of_sampled_responses_pass_chi_square(setting):
    """First and second token together, over seeds and over responses of a seed: the product of the model's own
    probabilities."""
    model, prompts = setting
    count, prompt = 4096, prompts[0].inputs["input_ids"]
    out = rollout(model, [prompts[0]] * 64, Sampling(64, 2), list(range(64)), slots=512)

    def probabilities(ids):
        with torch.no_grad():
            logits = model.module(input_ids=ids).logits[:, -1].double()
        return logits.index_fill(1, torch.tensor(model.suppressed_ids), -torch.inf).softmax(-1)

    size, [end] = model.head.weight.shape[0], model.end_ids
    after = probabilities(torch.cat([prompt.expand(size, -1), torch.arange(size)[:, None]], 1))
    after[end] = torch.zeros(size).index_fill(0, torch.tensor(model.pad_id), 1.0)  # nothing follows
    expected = count * (probabilities(prompt)[0][:, None] * after).flatten()
    seen = (size * out.tokens[:, 0] + out.tokens[:, 1]).bincount(minlength=size * size).double()
    assert seen[expected == 0].sum() == 0
    often = expected >= 5
    seen, expected = (torch.cat([x[often], x[~often].sum()[None]]) for x in (seen, expected))
    assert len(seen) > 50 and below_one_in_a_thousand(chi_square(seen, expected), len(seen) - 1)


def test_logprobs_are_those_of_the_model_that_is_trained(setting):
    model, prompts = setting
    out = rollout(model, prompts[:3], Sampling(4, 8, temperature=0.7, top_k=5), [1, 2, 3])
    hidden = response_hidden(model, prompts[:3], out)
    want = token_logprobs(hidden, model.head, out.packed_tokens)
    got = out.logprobs.flatten().index_select(0, out.packed_index)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


class Full:
    """`prefill` on a device that is full at the given calls, counted from 0; it keeps the tokens of each."""

    def __init__(self, monkeypatch, *at: int):
        self.at, self.sizes, self.prefill = at, list[int](), opsd.rollout.prefill
        monkeypatch.setattr(opsd.rollout, "prefill", self)

    def __call__(self, model, prompts):
        self.sizes.append(sum(prompt.length for prompt in prompts))
        stored = self.prefill(model, prompts)
        if len(self.sizes) - 1 in self.at:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return stored


def test_prompts_are_computed_within_the_budget_and_answers_stay_what_they_are(setting, monkeypatch, tmp_path):
    model, prompts = setting
    seeds, sampling = list(range(len(prompts))), Sampling(2, 8)
    full = Full(monkeypatch)
    whole = rollout(model, prompts, sampling, seeds)
    assert len(full.sizes) == 1
    longest = max(prompt.length for prompt in prompts)
    for tokens in (2 * longest, 1):
        full.sizes.clear()
        found = rollout(model, prompts, sampling, seeds, budget=Budget(tokens, tmp_path / "passes.json"))
        assert max(full.sizes) <= max(tokens, longest) and sum(full.sizes) == sum(p.length for p in prompts)
        assert token_lists(found) == token_lists(whole)
        torch.testing.assert_close(found.packed_logprobs, whole.packed_logprobs, rtol=1e-5, atol=1e-5)


def test_a_rollout_that_runs_out_of_memory_is_done_once_more_at_half_the_size(setting, monkeypatch, tmp_path):
    model, prompts = setting
    seeds, sampling = list(range(len(prompts))), Sampling(2, 8)
    model.tokens.take()
    whole = rollout(model, prompts, sampling, seeds)
    counts = model.tokens.take()
    full, budget = Full(monkeypatch, 0), Budget(1000, tmp_path / "passes.json")
    rollouts = Rollouts(model, slots=6, budget=budget)
    found = rollouts(prompts, sampling, seeds)
    assert token_lists(found) == token_lists(whole) and model.tokens.take() == counts
    assert rollouts.slots == 3 and budget.retries == 1 and budget.tokens == 1000, "training has its own passes"
    assert max(full.sizes[1:]) <= sum(prompt.length for prompt in prompts) // 2

    after = Rollouts(model, slots=6, budget=Budget.of(1000, budget.file))
    assert (after.slots, after.tokens) == (3, rollouts.tokens), "a resumed run begins where this one has got to"
    assert Rollouts(model, slots=2, budget=budget).slots == 2

    Full(monkeypatch, 0, 1)
    with pytest.raises(InputError, match="out of memory in a rollout of 3 responses at a time, and of 1"):
        rollouts(prompts, sampling, seeds)
