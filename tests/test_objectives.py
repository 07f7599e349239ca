"""Objectives against their formulas, and what the papers' definitions imply."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from opsd.engine import response_hidden
from opsd.group import micro_batches, with_advantages
from opsd.metrics import Sums
from opsd.objectives.distill import distill_loss
from opsd.objectives.logprobs import token_logprobs
from opsd.objectives.reward import clipped_loss, group_normalised, reward_loss
from opsd.objectives.sft import sft_loss
from opsd.opening import open_run
from opsd.sections import ObjectiveConfig
from opsd.step import learn, sample, teach
from opsd.teacher import score
from tests.jobs import text_job


def gradients(run, loss):
    run.model.module.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in run.model.trainable().items() if p.grad is not None}


@pytest.fixture
def opened(tmp_path):
    def make(*words):
        return open_run(text_job(tmp_path, *words))

    return make


def dense_jsd(hs, ht, w_s, w_t, beta=0.5):
    log_p, log_q = (hs @ w_s.T).double().log_softmax(-1), (ht @ w_t.T).double().log_softmax(-1)
    p, q = log_p.exp(), log_q.exp()
    log_m = ((1 - beta) * p + beta * q).log()
    return beta * (q * (log_q - log_m)).sum(-1) + (1 - beta) * (p * (log_p - log_m)).sum(-1)


def test_distillation_is_the_mean_per_response_then_over_responses():
    torch.manual_seed(0)
    hs, ht, w = torch.randn(7, 8, requires_grad=True), torch.randn(7, 8), torch.randn(11, 8)
    lengths = torch.tensor([2, 5])
    weights = (1.0 / lengths / 2).repeat_interleave(lengths)
    loss, sums = distill_loss(hs, w, ht, None, weights, ObjectiveConfig(backend="torch"))
    per_token = dense_jsd(hs.detach(), ht, w, w)
    assert loss.item() == pytest.approx(((per_token[:2].mean() + per_token[2:].mean()) / 2).item(), rel=1e-5)
    assert sums["divergence"].sum().item() == pytest.approx(per_token.sum().item(), rel=1e-5)
    entropy = -(torch.softmax(ht @ w.T, -1) * torch.log_softmax(ht @ w.T, -1)).sum()
    assert sums["teacher_entropy"].sum().item() == pytest.approx(entropy.item(), rel=1e-5)


DIVERGENCES = [
    {"divergence": "jsd", "beta": 0.2},
    {"divergence": "jsd", "beta": 0.7, "temperature": 2.5},
    {"divergence": "reverse_kl"},
    {"divergence": "reverse_kl", "temperature": 0.5},
    {"divergence": "forward_kl"},
    {"divergence": "forward_kl", "temperature": 2.5},
]


@pytest.mark.parametrize("values", DIVERGENCES, ids=str)
def test_the_loss_is_the_divergence_of_the_config(values):
    """Value and gradient against the dense formula in fp64."""
    torch.manual_seed(0)
    hs, ht, w_s, w_t = torch.randn(7, 8), torch.randn(7, 6), torch.randn(11, 8), torch.randn(11, 6)
    weights = torch.rand(7) + 0.1
    config = ObjectiveConfig(backend="torch", **values)
    ours = hs.clone().requires_grad_()
    loss, sums = distill_loss(ours, w_s, ht, w_t, weights, config)
    loss.backward()
    theirs = hs.double().requires_grad_()
    tau = config.temperature
    log_p = (theirs @ w_s.T.double() / tau).log_softmax(-1)
    log_q = (ht @ w_t.T).double().div(tau).log_softmax(-1)
    if config.divergence == "jsd":
        per_token = dense_jsd(theirs / tau, ht.double() / tau, w_s.double(), w_t.double(), config.beta)
    else:
        from_, to = (log_p, log_q) if config.divergence == "reverse_kl" else (log_q, log_p)
        per_token = (from_.exp() * (from_ - to)).sum(-1)
    want = (weights * per_token).sum()
    want.backward()
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    assert sums["divergence"].sum().item() == pytest.approx(per_token.sum().item(), rel=1e-4)
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-5)


def test_same_prompts_and_weights_give_zero_loss_and_zero_gradient(opened):
    with opened("prompts.privilege=none", "teacher.kind=frozen", "train.prompts_per_step=2") as run:
        rows = run.rows(0)[:2]
        group = sample(run, rows, 0)
        loss = learn(run, group, teach(run, group), Sums())
        grads = gradients(run, loss)
        assert loss.item() == 0.0
        assert max(g.abs().max().item() for g in grads.values()) == 0.0


def test_micro_batches_add_up(opened, tmp_path):
    """Many passes, some of a prompt's responses apart, have the loss and gradient of one."""
    totals, counts = [], []
    for width in (30, 10_000):
        with open_run(
            text_job(tmp_path, f"engine.token_budget={width}", f"train.run_dir={tmp_path / str(width)}")
        ) as run:
            run.model.module.zero_grad()
            sums = Sums()
            parts = micro_batches(run.config, sample(run, run.rows(0), 0))
            counts.append(len(parts))
            for group in parts:
                learn(run, group, teach(run, group), sums).backward()
            grads = {n: p.grad.clone() for n, p in run.model.trainable().items()}
            totals.append((sums.read(), grads))
    (a, grads_a), (b, grads_b) = totals
    assert counts[0] > 4, "a prompt was split too"
    assert counts[-1] == 1
    assert a["tokens"] == b["tokens"] and a["loss"] == pytest.approx(b["loss"], rel=1e-5)
    assert a["loss"] > 1e-4
    for name, grad in grads_b.items():
        torch.testing.assert_close(grads_a[name], grad, rtol=1e-3, atol=1e-6)


def test_teacher_scores_the_same_tokens_though_its_prompt_is_longer(opened):
    with opened("train.prompts_per_step=2") as run:
        rows = run.rows(0)[:2]
        group = sample(run, rows, 0)
        hidden, _ = teach(run, group)
        teacher_prompts = [run.prompts.teacher(e) for e in rows]
        assert all(t.length > s.length for t, s in zip(teacher_prompts, group.prompts, strict=True))
        at = 0
        for i, length in enumerate(group.responses.lengths):
            prompt = teacher_prompts[group.responses.owners[i]]
            whole = torch.cat([prompt.inputs["input_ids"][0], group.responses.tokens[i, :length]])[None]
            logits = run.model.module(input_ids=whole).logits[0, prompt.length - 1 : -1]
            torch.testing.assert_close(hidden[at : at + length] @ run.model.head.weight.T, logits, rtol=1e-4, atol=1e-4)
            at += length


def test_alpha_zero_is_pure_distillation_and_alpha_adds_the_raw_reward_term(opened, tmp_path):
    losses = {}
    for alpha in (0.0, 0.2):
        with open_run(text_job(tmp_path, f"objective.alpha={alpha}", f"train.run_dir={tmp_path / f'a{alpha}'}")) as run:
            group = sample(run, run.rows(0)[:2], 0)
            target = teach(run, group)
            texts = ["<think> low </think> <answer> sad </answer>"] * len(group.texts)
            group = with_advantages(run.config, replace(group, texts=texts))
            losses[alpha] = learn(run, group, target, Sums()).item()
    with open_run(text_job(tmp_path, f"train.run_dir={tmp_path / 'x'}")) as run:
        group = sample(run, run.rows(0)[:2], 0)
        states = response_hidden(run.model, group.prompts, group.responses)
        logprobs = token_logprobs(states, run.model.head, group.responses.packed_tokens)
        owners = [e for e in group.examples for _ in range(3)]
        rewards = torch.tensor(
            [1.0 + float(e.label == "sad") for e in owners]
        )  # format, and accuracy where sad is right
        weights = group.responses.token_weights / 12  # 4 prompts x 3 responses a step
        term = reward_loss(logprobs, rewards, group.responses.lengths, weights).item()
    assert losses[0.2] - losses[0.0] == pytest.approx(0.2 * term, rel=1e-4)
    assert abs(term) > 1e-3


def test_alpha_zero_never_looks_at_a_reward(opened, monkeypatch):
    """Loss and gradient of alpha = 0 are those of the distillation loss alone, bit for bit, NaN rewards or not."""

    def refuse(*args):
        raise AssertionError("alpha = 0 has no reward term")

    for name in ("opsd.group.reward", "opsd.step.reward_loss", "opsd.step.token_logprobs"):
        monkeypatch.setattr(name, refuse)
    with opened("rewards.accuracy=3", "rewards.format=7") as run:
        [group] = [with_advantages(run.config, sample(run, run.rows(0)[:2], 0))]
        group = replace(group, advantages=torch.full((6,), torch.nan))
        target = teach(run, group)
        loss = learn(run, group, target, Sums())
        grads = gradients(run, loss)
        hidden = response_hidden(run.model, group.prompts, group.responses)
        weights = group.responses.token_weights / 12
        alone, _ = distill_loss(hidden, run.model.head, *target, weights, run.config.objective)
        assert torch.equal(loss, alone) and loss.item() > 0
        for name, grad in gradients(run, alone).items():
            assert torch.equal(grads[name], grad), name


def test_the_reward_terms_gradient_by_autograd_through_the_model(tmp_path):
    """grad L = grad L_distill - alpha * mean over responses of R grad (1/T) log pi(y), from a plain forward."""
    grads = {}
    for alpha in (0.0, 0.7):
        with open_run(text_job(tmp_path, f"objective.alpha={alpha}", f"train.run_dir={tmp_path / str(alpha)}")) as run:
            group = sample(run, run.rows(0)[:2], 0)
            texts = [text for e in group.examples for text in (f"<answer>{e.label}</answer>", "", "<think>")]
            group = with_advantages(run.config, replace(group, texts=texts))
            grads[alpha] = gradients(run, learn(run, group, teach(run, group), Sums()))
    total = 0.0
    for i in (0, 3):  # the responses whose reward is 1, among rewards of 0
        length, prompt = group.responses.lengths[i], group.prompts[i // 3].inputs["input_ids"][0]
        tokens = group.responses.tokens[i, :length]
        logits = run.model.module(input_ids=torch.cat([prompt, tokens])[None]).logits[0, len(prompt) - 1 : -1]
        total = total - logits.log_softmax(-1)[torch.arange(length), tokens].mean() / 12
    for name, grad in gradients(run, 0.7 * total).items():
        torch.testing.assert_close(grads[0.7][name] - grads[0.0][name], grad, rtol=1e-3, atol=2e-6)
        assert grad.abs().max() > 1e-5 or "layernorm" in name


RATIOS = [  # ratio, advantage -> loss and its gradient by log pi of a single token, clip 0.2
    (1.0, 1.0, -1.0, -1.0),
    (1.0, -2.0, 2.0, 2.0),
    (1.1, 1.0, -1.1, -1.1),
    (1.5, 1.0, -1.2, 0.0),  # clipped
    (1.5, -1.0, 1.5, 1.5),
    (0.5, 1.0, -0.5, -0.5),
    (0.5, -1.0, 0.8, 0.0),  # clipped
    (1.5, 0.0, 0.0, 0.0),
]


@pytest.mark.parametrize("ratio, advantage, loss, slope", RATIOS)
def test_the_clipped_ratio(ratio, advantage, loss, slope):
    old = torch.tensor([-1.3])
    logprob = (old + torch.tensor(ratio).log()).requires_grad_()
    got, clipped = clipped_loss(logprob, old, torch.tensor([advantage]), [1], torch.ones(1), 0.2)
    got.backward()
    assert (got.item(), logprob.grad.item()) == pytest.approx((loss, slope), abs=1e-6)
    assert clipped.item() == (advantage != 0 and slope == 0)


def test_a_fresh_rollout_has_the_plain_policy_gradient():
    torch.manual_seed(0)
    logprobs, advantages, lengths = torch.randn(9, requires_grad=True), torch.randn(3), [2, 3, 4]
    weights = torch.rand(9)
    loss, clipped = clipped_loss(logprobs, logprobs.detach(), advantages, lengths, weights, 0.2)
    (grad,) = torch.autograd.grad(loss, logprobs)
    (plain,) = torch.autograd.grad(reward_loss(logprobs, advantages, lengths, weights), logprobs)
    torch.testing.assert_close(grad, plain)
    assert clipped.item() == 0


def test_reward_gradient_is_minus_reward_times_grad_of_the_mean_logprob():
    torch.manual_seed(0)
    logprobs = torch.randn(5, requires_grad=True)
    lengths = torch.tensor([2, 3])
    loss = reward_loss(logprobs, torch.tensor([2.0, -1.0]), [2, 3], (1.0 / lengths / 2).repeat_interleave(lengths))
    loss.backward()
    assert logprobs.grad.tolist() == pytest.approx([-0.5, -0.5, 1 / 6, 1 / 6, 1 / 6])


def test_group_normalised_advantages():
    out = group_normalised(torch.tensor([1.0, 0.0, 1.0, 0.0, 2.0, 2.0, 2.0, 2.0]), 4)
    assert out[:4].tolist() == pytest.approx([1, -1, 1, -1], abs=1e-3)
    assert out[4:].tolist() == [0, 0, 0, 0]
    assert group_normalised(torch.tensor([3.0]), 1).tolist() == [0.0]


def test_sft_loss_is_the_mean_negative_logprob_of_the_rows_answers(opened):
    with opened("objective.kind=sft", "train.prompts_per_step=2") as run:
        rows = run.rows(0)[:2]
        group = sample(run, rows, 0)
        loss = learn(run, group, None, Sums()).item()
        want = 0.0
        for prompt, example in zip(group.prompts, rows, strict=True):
            tokens = torch.tensor([*run.model.tokenizer(example.answer)["input_ids"], run.model.end_ids[0]])
            whole = torch.cat([prompt.inputs["input_ids"][0], tokens])[None]
            log_p = run.model.module(input_ids=whole).logits[0, prompt.length - 1 : -1].log_softmax(-1)
            want -= log_p[torch.arange(len(tokens)), tokens].mean().item() / 2
        assert loss == pytest.approx(want, rel=1e-5)
        assert sft_loss(torch.tensor([-2.0]), torch.tensor([1.0])).item() == 2.0


def test_teacher_view_fraction_of_sft(opened, tmp_path):
    counts = []
    for fraction in (0.0, 0.5, 1.0):
        words = [
            "objective.kind=sft",
            f"objective.teacher_view_fraction={fraction}",
            f"train.run_dir={tmp_path / str(fraction)}",
        ]
        with open_run(text_job(tmp_path, *words)) as run:
            lengths = [
                (p.length, run.prompts.teacher(e).length)
                for step in range(20)
                for p, e in zip(sample(run, run.rows(step), step).prompts, run.rows(step), strict=True)
            ]
            counts.append(sum(got == teacher for got, teacher in lengths) / len(lengths))
    assert counts[0] == 0 and counts[2] == 1 and 0.3 < counts[1] < 0.7


def test_score_does_not_depend_on_sharing(opened):
    with opened() as run:
        group = sample(run, run.rows(0)[:2], 0)
        prompts = [run.prompts.teacher(e) for e in group.examples]
        a, _ = score(run.teacher, run.model, prompts, group.responses, share_prefix=True)
        b, _ = score(run.teacher, run.model, prompts, group.responses, share_prefix=False)
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_activation_checkpointing_changes_no_gradient_and_saves_memory(tmp_path, adapter):
    found = []
    for on in (False, True):
        words = [
            f"model.activation_checkpointing={on}",
            f"model.adapter={adapter}",
            f"train.run_dir={tmp_path / str(on)}",
        ]
        with open_run(text_job(tmp_path, *words, "engine.token_budget=10000")) as run:
            [part] = micro_batches(run.config, sample(run, run.rows(0), 0))
            target, held = teach(run, part), []

            def note(tensor, held=held):
                held.append(tensor.nbytes)
                return tensor

            with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
                loss = learn(run, part, target, Sums())
            found.append((sum(held), gradients(run, loss)))
    (plain, grads), (saved, again) = found
    assert saved < 0.6 * plain
    for name, grad in grads.items():
        torch.testing.assert_close(again[name], grad, rtol=1e-5, atol=1e-7)
