"""The train loop, step by step: what a run leaves behind equals what its parts say it should."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from opsd import train as loop
from opsd.engine import response_hidden
from opsd.evaluate import measure
from opsd.group import micro_batches, with_advantages
from opsd.log import RunDir
from opsd.metrics import Sums
from opsd.objectives.logprobs import token_logprobs
from opsd.opening import open_run
from opsd.shelf import Shelf
from opsd.step import learn, sample, teach
from opsd.train import train
from tests.jobs import text_job

MU = 0.9


def words_of(tmp_path, name):
    return f"train.run_dir={tmp_path / name}"


def checkpoints(config):
    return sorted((config.train.run_dir / "checkpoints").glob("step-*"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 4 steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("flow")
    config = text_job(folder, "checkpoint.every=1", "checkpoint.keep=9", "rollout.max_new_tokens=6")
    train(config)
    return config


def test_the_ema_teacher_follows_every_update(finished):
    """theta_T after n steps = mu^n start + (1 - mu) sum_i mu^(n - i) student_i, in each checkpoint."""
    start = load_file(finished.model.path + "/model.safetensors")
    want = {name: t.double() for name, t in start.items()}
    found = checkpoints(finished)
    assert [path.name for path in found] == [f"step-{n:06d}" for n in (1, 2, 3, 4)]
    for path in found:
        student = load_file(path / "model.safetensors")
        want = {name: MU * t + (1 - MU) * student[name].double() for name, t in want.items()}
        saved = load_file(path / "trainer.safetensors")
        teacher = {n.removeprefix("teacher/"): t for n, t in saved.items() if n.startswith("teacher/")}
        assert teacher.keys() == want.keys()
        for name, tensor in teacher.items():
            torch.testing.assert_close(tensor.double(), want[name], rtol=1e-6, atol=1e-7)
    assert max((want[n] - start[n]).abs().max().item() for n in want) > 1e-4, "the student moved"


def test_last_is_the_newest_checkpoint(finished):
    last = finished.train.run_dir / "checkpoints" / "last"
    assert last.resolve() == checkpoints(finished)[-1].resolve()
    assert Shelf(last.parent).newest().path.name == last.resolve().name


def test_the_first_record_is_what_the_parts_of_the_step_give(finished, tmp_path):
    """Divergence and entropies per token, accuracy and the like per response: recomputed densely in fp64."""
    config = text_job(tmp_path, "rollout.max_new_tokens=6")
    tokens, totals = 0, dict.fromkeys(("divergence", "student_entropy", "teacher_entropy"), 0.0)
    loss, truncated = 0.0, 0
    with open_run(config) as run, torch.no_grad():
        for group in micro_batches(run.config, sample(run, run.rows(0), 0)):
            prompts = [run.prompts.teacher(example) for example in group.examples]
            log_p, log_q = (
                (response_hidden(run.model, views, group.responses) @ run.model.head.weight.T).double().log_softmax(-1)
                for views in (group.prompts, prompts)
            )
            p, q = log_p.exp(), log_q.exp()
            log_m = ((p + q) / 2).log()
            divergence = ((p * (log_p - log_m)).sum(-1) + (q * (log_q - log_m)).sum(-1)) / 2
            totals["divergence"] += divergence.sum().item()
            totals["student_entropy"] -= (p * log_p).sum().item()
            totals["teacher_entropy"] -= (q * log_q).sum().item()
            loss += sum(part.mean().item() for part in divergence.split(group.responses.lengths)) / 12
            tokens += sum(group.responses.lengths)
            ends = zip(group.responses.tokens, group.responses.lengths, strict=True)
            truncated += sum(row[length - 1].item() not in run.model.end_ids for row, length in ends)
    record = RunDir(finished.train.run_dir).read("metrics")[0]
    assert tokens > 12, "a response of one token each would not tell tokens from responses"
    assert {name: record[name] for name in totals} == pytest.approx(
        {n: v / tokens for n, v in totals.items()}, rel=1e-4
    )
    assert record["loss"] == pytest.approx(loss, rel=1e-4)
    assert record["response_length"] == tokens / 12 and record["truncated"] == truncated / 12


def test_the_leak_rate_counts_responses_that_speak_of_the_teachers_view(tmp_path, monkeypatch):
    texts = ["The evidence says so.", "As given, sad.", "a sad mouth"]
    monkeypatch.setattr("opsd.step.decode", lambda tokenizer, responses: (texts * 99)[: len(responses.lengths)])
    with open_run(text_job(tmp_path)) as run:
        group = sample(run, run.rows(0)[:2], 0)
    assert group.scores["leak_rate"] == sum(text != texts[2] for text in group.texts) > 0


def test_two_steps_sample_different_responses_for_the_same_row(tmp_path):
    with open_run(text_job(tmp_path)) as run:
        rows = run.rows(0)[:2]
        first, again, other = (sample(run, rows, step) for step in (0, 0, 1))
    assert first.responses.packed_tokens.tolist() == again.responses.packed_tokens.tolist()
    assert first.responses.packed_tokens.tolist() != other.responses.packed_tokens.tolist()


def test_rows_of_a_step_sample_from_streams_of_their_own(tmp_path):
    with open_run(text_job(tmp_path)) as run:
        example = run.rows(0)[0]
        group = sample(run, [example, example], 0)
    first, second = (group.responses.take([i, i + 1, i + 2], [0, 0, 0]) for i in (0, 3))
    assert first.packed_tokens.tolist() != second.packed_tokens.tolist()


def reward_step(run, texts):
    """Loss and gradients of one pass of two prompts whose three responses read as given."""
    group = sample(run, run.rows(0)[:2], 0)
    group = with_advantages(run.config, replace(group, texts=texts(group)))
    loss = learn(run, group, teach(run, group), Sums())
    run.model.module.zero_grad()
    loss.backward()
    return group, loss.item(), {name: p.grad.clone() for name, p in run.model.trainable().items()}


def test_reward_alone_learns_nothing_from_a_group_whose_rewards_are_equal(tmp_path):
    good = "<think> low </think> <answer> {} </answer>"
    with open_run(text_job(tmp_path, "objective.kind=reward")) as run:
        _, loss, grads = reward_step(run, lambda g: [good.format(e.label) for e in g.examples for _ in range(3)])
    assert loss == 0.0 and max(grad.abs().max().item() for grad in grads.values()) == 0.0


def test_reward_alone_uses_normalised_advantages(tmp_path):
    good = "<think> low </think> <answer> {} </answer>"
    with open_run(text_job(tmp_path, "objective.kind=reward")) as run:
        texts = lambda g: [t for e in g.examples for t in (good.format(e.label), "", "")]  # noqa: E731
        group, loss, grads = reward_step(run, texts)
        hidden = response_hidden(run.model, group.prompts, group.responses)
        logprobs = token_logprobs(hidden, run.model.head, group.responses.packed_tokens)
        means = torch.stack([part.mean() for part in logprobs.split(group.responses.lengths)])
        # rewards 2, 0, 0: mean 2/3, deviation sqrt(8)/3
        advantages = torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)]).repeat(2)
        run.model.module.zero_grad()
        (-(advantages * means).sum() / 12).backward()  # the ratio is 1: the plain policy gradient
        want = {name: p.grad for name, p in run.model.trainable().items()}
    assert loss == pytest.approx(0.0, abs=1e-4), "the advantages of a prompt sum to 0"
    assert max(grad.abs().max().item() for grad in want.values()) > 0.01
    for name, grad in grads.items():
        torch.testing.assert_close(grad, want[name], rtol=1e-3, atol=1e-5)


def test_later_updates_on_a_rollout_have_the_clipped_ratio_to_the_policy_that_drew_it(tmp_path, monkeypatch):
    """Loss and clipped share of the second update: from plain forwards of the start and of the once updated model."""
    good = "<think> low </think> <answer> {} </answer>"
    monkeypatch.setattr("opsd.step.decode", lambda _, responses: [good.format("sad"), "", ""] * 4)
    words = ["objective.kind=reward", "train.steps=1", "optim.lr=3e-2", "checkpoint.every=0", "rewards.accuracy=0"]
    runs = {
        n: train(text_job(tmp_path, *words, f"objective.updates_per_rollout={n}", words_of(tmp_path, str(n))))
        for n in (1, 2)
    }
    with open_run(text_job(tmp_path, *words)) as run:
        group = sample(run, run.rows(0), 0)
        old = plain_logprobs(run.model.module, group)
    updated = type(run.model.module).from_pretrained(runs[1].directory.checkpoints / "last")
    ratio = (plain_logprobs(updated, group) - old).exp()
    advantages = torch.tensor([2**0.5, -(0.5**0.5), -(0.5**0.5)]).repeat(4).double()
    per_token = advantages.repeat_interleave(torch.tensor(group.responses.lengths))
    kept = torch.minimum(ratio * per_token, ratio.clamp(0.8, 1.2) * per_token)
    first, second = (runs[n].directory.read("metrics")[-1] for n in (1, 2))
    want = -sum(part.mean().item() for part in kept.split(group.responses.lengths)) / 12
    assert second["loss"] == pytest.approx(want, rel=1e-3) and abs(want) > 0.05
    clipped = ((ratio > 1.2) & (per_token > 0)) | ((ratio < 0.8) & (per_token < 0))
    assert (
        first["clipped"] == 0 and second["clipped"] == pytest.approx(clipped.double().mean().item()) and clipped.any()
    )
    assert not torch.equal(*(run.model.head.weight for run in runs.values()))


def plain_logprobs(module, group):
    """(N,) fp64 log-probabilities of the responses' tokens, each in a row of its own."""
    parts = []
    for tokens, length, owner in zip(
        group.responses.tokens, group.responses.lengths, group.responses.owners, strict=True
    ):
        prompt = group.prompts[owner].inputs["input_ids"][0]
        with torch.no_grad():
            logits = module(input_ids=torch.cat([prompt, tokens[:length]])[None]).logits[0, len(prompt) - 1 : -1]
        parts.append(logits.double().log_softmax(-1)[torch.arange(length), tokens[:length]])
    return torch.cat(parts)


def test_only_the_students_pass_has_dropout(tmp_path, monkeypatch):
    """`train` runs its passes in the order rollout, teacher, student; dropout is on in the last of them alone."""
    seen, now = {}, [None]

    def spied(name):
        step = getattr(loop, name)

        def call(run, *args):
            now[0] = name
            if not hasattr(run, "spied"):
                run.spied = run.model.module.get_base_model().get_decoder().layers[0].self_attn.q_proj
                dropout = run.spied.lora_dropout["default"]
                dropout.register_forward_hook(lambda m, *_: seen.setdefault(now[0], set()).add(m.training))
                watch = run.model.module.get_base_model().get_decoder().register_forward_pre_hook
                watch(lambda m, _: seen.setdefault(f"{now[0]} model", set()).add(m.training))
            try:
                return step(run, *args)
            finally:
                now[0] = None

        monkeypatch.setattr(loop, name, call)

    for name in ("sample", "teach", "learn"):
        spied(name)
    words = ["model.adapter=lora", "model.lora_dropout=0.5", "train.steps=2", "evaluate.teacher=false"]
    train(text_job(tmp_path, *words, "teacher.kind=live"))
    assert seen.pop(None, {False}) == {False} and seen.pop("None model", {False}) == {False}, "evaluation"
    want = {"sample": {False}, "teach": {False}, "learn": {True}}
    assert seen == {**want, **{f"{name} model": on for name, on in want.items()}}


def test_dropout_moves_the_students_loss_and_nothing_else(tmp_path):
    records = []
    for rate in ("0.0", "0.9"):
        config = text_job(
            tmp_path, "model.adapter=lora", f"model.lora_dropout={rate}", words_of(tmp_path, f"run-{rate}")
        )
        with open_run(config) as run:
            with torch.no_grad():
                for name, p in run.model.trainable().items():
                    if ".lora_B." in name:  # an adapter that does something
                        p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
            group = sample(run, run.rows(0)[:2], 0)
            hidden, _ = teach(run, group)
            torch.manual_seed(0)
            records.append((group.responses.packed_tokens, hidden, learn(run, group, (hidden, None), Sums()).item()))
    (tokens, hidden, loss), (tokens_dropped, hidden_dropped, loss_dropped) = records
    assert torch.equal(tokens, tokens_dropped) and torch.equal(hidden, hidden_dropped)
    assert abs(loss - loss_dropped) > 1e-3


def test_the_teachers_view_is_measured_with_the_teachers_weights(tmp_path, monkeypatch):
    """A frozen teacher answers as at the start whatever became of the student."""
    asked = []
    monkeypatch.setattr("opsd.evaluate.accuracy", lambda text, label: asked.append(text) or 0.0)
    with open_run(text_job(tmp_path, "teacher.kind=frozen")) as run:
        rounds = []
        for step in (0, 1):
            asked.clear()
            measure(run, step)
            rounds.append(tuple(asked))
            with torch.no_grad():
                for p in run.model.trainable().values():
                    p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)))
        records = run.directory.read("evaluations")
    assert [(r["step"], r["view"]) for r in records] == [(s, v) for s in (0, 1) for v in ("student", "teacher")]
    start, disturbed = rounds
    half = len(start) // 2
    assert start[half:] == disturbed[half:], "the teacher's view"
    assert start[:half] != disturbed[:half], "the student's view"


def test_a_run_killed_before_its_first_checkpoint_starts_over(tmp_path, monkeypatch):
    config = text_job(tmp_path, "evaluate.every=1", "log.samples_every=1")
    calls = []

    def killed(run, step):
        calls.append(step)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(loop, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    directory = RunDir(config.train.run_dir)
    assert calls == [2] and [r["step"] for r in directory.read("metrics")] == [1, 2]
    assert len(directory.read("evaluations")) == 6
    train(config, resume=True)
    assert [r["step"] for r in directory.read("metrics")] == [1, 2, 3, 4]
    views = [(r["step"], r["view"]) for r in directory.read("evaluations")]
    assert views == [(step, view) for step in range(5) for view in ("student", "teacher")]
    assert len({str(r) for r in directory.read("samples")}) <= len(directory.read("samples")) == 16
