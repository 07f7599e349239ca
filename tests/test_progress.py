"""What the metrics say of single tokens, and how a person is shown them."""

from __future__ import annotations

import json

import pytest
import torch

from opsd import progress
from opsd.engine import response_hidden
from opsd.metrics import Sums
from opsd.opening import open_run
from opsd.progress import left, make_progress
from opsd.step import learn, sample, teach
from opsd.train import train
from tests.jobs import text_job


def dense(run, group):
    """fp64 JSD per token, entropies and likeliest tokens, from whole distributions."""
    sides = []
    for prompts in (group.prompts, group.views):
        with run.model.mode(train=False), torch.no_grad():
            hidden = response_hidden(run.model, prompts, group.responses).double()
        sides.append(torch.log_softmax(hidden @ run.model.head.weight.detach().double().T, -1))
    p, q = sides
    mixture = torch.logaddexp(p, q) - torch.log(torch.tensor(2.0, dtype=torch.float64))
    jsd = 0.5 * ((p.exp() * (p - mixture)).sum(-1) + (q.exp() * (q - mixture)).sum(-1))
    entropies = [-(x.exp() * x).sum(-1) for x in sides]
    return jsd, entropies, (p.argmax(-1) == q.argmax(-1)).double()


def test_health_of_tokens_is_that_of_the_whole_distributions(tmp_path):
    with open_run(text_job(tmp_path, "teacher.kind=live")) as run:
        group = sample(run, run.rows(0), 0)
        sums = Sums()
        learn(run, group, teach(run, group), sums)
        jsd, (student, teacher), agree = dense(run, group)
        values = sums.read()
        close = {"rel": 1e-4, "abs": 1e-5}
        assert values["divergence"] == pytest.approx(jsd.sum().item(), **close)
        assert values["entropy_gap"] == pytest.approx((student - teacher).abs().sum().item(), **close)
        assert values["top1_agreement"] == agree.sum().item()
        assert 0 < agree.sum().item() < len(agree)
        assert sums.largest_divergence() == pytest.approx(jsd.max().item(), **close)
        some = list(zip(group.rows, group.texts, strict=True))
        found = sums.divergences([some[4], some[1], (group.rows[0], "another text")])
        parts = jsd.split(list(group.responses.lengths))
        assert found[0] == pytest.approx(parts[4].tolist(), **close)
        assert found[1] == pytest.approx(parts[1].tolist(), **close)
        assert found[2] is None


@pytest.mark.parametrize("share", [True, False])
def test_saved_tokens_are_those_a_padded_loop_computes_besides(tmp_path, share):
    words = [f"engine.share_prefix={share}", "train.steps=2", "optim.lr=1e-9", "engine.token_budget=9999"]
    run = train(text_job(tmp_path, *words))
    for line in run.directory.read("metrics"):
        computed, padded = line["computed_tokens"], line["padded_tokens"]
        assert line["saved_tokens"] == pytest.approx(1 - computed / padded)
        assert 0.2 < line["saved_tokens"] < 0.8 if share else computed == padded


def test_samples_hold_every_token_with_its_divergence(tmp_path, capsys):
    run = train(text_job(tmp_path, "log.samples=3", "log.show=2", "log.progress=plain"))
    shown = [line for line in capsys.readouterr().out.splitlines() if line.startswith("step 1  row-")]
    assert len(shown) == 2
    lines = run.directory.read("samples")
    assert len(lines) == 3
    for line in lines:
        assert len(line["tokens"]) == len(line["divergence"])
        assert all(value >= 0 for value in line["divergence"])
    means = {line["step"]: line["divergence_max"] for line in run.directory.read("metrics")}
    assert all(max(line["divergence"]) <= means[line["step"]] * 1.001 for line in lines)


@pytest.mark.parametrize("kind", ["reward", "sft"])
def test_without_a_teacher_samples_are_texts(tmp_path, kind):
    run = train(text_job(tmp_path, f"objective.kind={kind}", "log.samples=1", "log.show=1"))
    [line] = run.directory.read("samples")
    assert line.keys() == {"step", "id", "label", "response"}
    assert "divergence_max" not in run.directory.read("metrics")[0]


RECORD = {"step": 3, "id": "clip-7", "label": "sad", "response": "so sad", "tokens": ["so", " sad"]}


def test_a_line_of_a_log_file_names_the_divergence_of_tokens_worth_a_look(capsys):
    make_progress("plain", 9).sample({**RECORD, "divergence": [0.001, 0.25]})
    assert capsys.readouterr().out == "step 3  clip-7 (sad): so sad[0.25]\n"


def test_a_terminal_shows_it_in_colour(monkeypatch):
    made, printed = make_progress("rich", 9), []
    monkeypatch.setattr(made._live.console, "print", printed.append)
    made.sample({**RECORD, "divergence": [0.001, 0.25]})
    line = printed[0]
    made.close()
    assert {line.plain[span.start : span.end]: span.style for span in line.spans} == {
        "so": "default",
        " sad": "dark_orange",
    }


@pytest.mark.parametrize("rate, shown", [(0.25, True), (0.0, False)])
def test_the_line_of_a_step_has_what_was_saved_and_found(capsys, rate, shown):
    record = {"step": 9, "loss": 0.5, "saved_tokens": 0.42, "teacher_cache_hit_rate": rate}
    make_progress("plain", 9).step(record | {"teacher_tokens_per_second": 120.4})
    line = capsys.readouterr().out
    assert "saved 42%" in line and "tok/s teacher 120" in line
    assert ("cache hits 25%" in line) is shown


def test_time_left_of_a_plain_line(capsys, monkeypatch):
    now = iter([100.0, 110.0, 4000.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(now))
    made = make_progress("plain", 100)
    for step in (1, 11, 100):
        made.step({"step": step, "loss": 0.5})
    first, second, last = capsys.readouterr().out.splitlines()
    assert "left" not in first and "left" not in last
    assert second.endswith("left 1 min 29 s")


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (7265, "2 h 1 min"), (180000, "2 d 2 h")]
)
def test_times(seconds, text):
    assert left(seconds) == text


def test_samples_are_json_a_reader_takes(tmp_path):
    run = train(text_job(tmp_path, "log.samples=1"))
    [line] = (run.directory.path / "samples.jsonl").read_text().splitlines()
    assert json.loads(line)["tokens"]
