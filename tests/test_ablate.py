"""`python -m opsd.ablate`: arms on one budget, run once, compared row by row."""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from PIL import Image

from opsd.ablation import command
from opsd.ablation.arms import ARMS, split_arms
from opsd.ablation.command import main
from opsd.ablation.outcome import Outcome, summary
from opsd.ablation.table import markdown
from opsd.config import load_config
from opsd.errors import InputError
from opsd.log import RunDir
from opsd.train import train
from tests.jobs import base_words, text_job


@pytest.fixture
def job(tmp_path, monkeypatch):
    """A call of the command on the small text job, its arms trained in this process: (arms trained, exit status)."""
    text_job(tmp_path)
    trained = []

    def in_process(config):
        trained.append(config.train.run_dir.name)
        train(load_config(config.train.run_dir / "config.yaml"), resume=True)  # as --resume does

    monkeypatch.setattr(command, "_train", in_process)
    words = [word for word in base_words(tmp_path) if not word.startswith("train.run_dir")]
    (tmp_path / "job.yaml").write_text("model:\n  path: model\n")

    def call(*more):
        trained.clear()
        status = main([str(tmp_path / "job.yaml"), *words, "--out", str(tmp_path / "out"), *more])
        return list(trained), status

    return call


def test_every_arm_once_and_one_table(job, tmp_path, capsys):
    out = tmp_path / "out"
    assert job("grpo:optim.lr=1e-2", "objective.alpha=0.2") == (list(ARMS), 0)
    record = json.loads((out / "ablation.json").read_text())
    arms = record["arms"]
    assert list(arms) == list(ARMS) and record["budget"]["steps"] == 4 and record["environment"]["commit"]
    assert [arm["updates"] for arm in arms.values()] == [0, 4, 4, 4, 4, 4]
    assert [arm["sampled_responses"] for arm in arms.values()] == [0, 0, 48, 48, 48, 48]
    assert arms["grpo"]["settings"] == ["optim.lr=1e-2"] and arms["opsd"]["settings"] == []

    answers = {name: [r for r in RunDir(out / name).read("answers") if r["view"] == "student"] for name in ARMS}
    start = [{k: v for k, v in r.items() if k != "step"} for r in answers["base"]]
    right = {name: [r["right"] for r in records[-7:]] for name, records in answers.items()}
    for name, records in answers.items():
        assert [{k: v for k, v in r.items() if k != "step"} for r in records if r["step"] == 0] == start
        assert arms[name]["accuracy"]["n"] == 7 == len(start)
        assert arms[name]["accuracy"]["accuracy"] == pytest.approx(sum(right[name]) / 7)
        if name != "opsd":
            assert arms[name]["minus_opsd"]["value"] == pytest.approx((sum(right[name]) - sum(right["opsd"])) / 7)

    rates = {name: RunDir(out / name).read("metrics")[0]["lr"] for name in ARMS if name != "base"}
    assert rates == {name: 1e-2 if name == "grpo" else 1e-3 for name in rates}
    alphas = {name: load_config(out / name / "config.yaml").objective.alpha for name in ARMS}
    assert alphas == {name: 0.0 if name in ("sft", "grpo") else 0.2 for name in ARMS}

    table = (out / "ablation.md").read_text()
    assert table in capsys.readouterr().out
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + len(ARMS) and "lr 0.01 |" in rows[4] and "lr 0.001, alpha 0.2 |" in rows[7]
    with Image.open(out / "ablation.png") as image:
        assert image.width > 1000 and len(set(image.convert("L").resize((64, 32)).tobytes())) > 20


def outcome(name, config, answers, format=1.0, metrics=()):
    """An arm whose student answered rows with the labels a, b, b, c like this."""
    rows = [
        {"id": f"row-{i}", "label": label, "answer": said, "right": float(said == label.lower()), "format": format}
        for i, (label, said) in enumerate(zip("Abbc", answers, strict=True))
    ]
    return Outcome(ARMS[name], config, (), rows, list(metrics), None)


def test_the_record_of_known_answers(tmp_path):
    config = load_config(None, base_words(tmp_path))
    hybrid = load_config(None, [*base_words(tmp_path), "objective.alpha=0.5", "rewards.format=3"])
    lines = [
        {"step": step, "accuracy": 0.5, "format": 0.25, "response_length": 7.0, "seconds": seconds}
        for step, seconds in ((2, 10.0), (4, 1.0))
    ]
    arms = [
        outcome("base", config, ["a", None, "nonsense", "b"], format=0.0),
        outcome("sft", config, ["a", "b", "b", "c"]),
        outcome("opsd", hybrid, ["b", "b", "b", "c"], metrics=lines),
    ]
    record = summary(arms)["arms"]
    assert [arm["accuracy"]["accuracy"] for arm in record.values()] == [0.25, 1.0, 0.75]
    assert [arm.get("minus_base", {}).get("value") for arm in record.values()] == [None, 0.75, 0.5]
    assert [arm.get("minus_opsd", {}).get("value") for arm in record.values()] == [-0.5, 0.25, None]
    assert record["base"]["minus_opsd"]["low"] < -0.5 < record["base"]["minus_opsd"]["high"]
    # F1 of a, b, c: 1, 0, 0; all 1; 0, 4/5, 1
    assert [arm["macro_f1"]["value"] for arm in record.values()] == pytest.approx([1 / 3, 1.0, 0.6])
    assert [arm["format"] for arm in record.values()] == [0.0, 1.0, 1.0]
    assert record["opsd"]["training_seconds"] == 22.0 and record["opsd"]["alpha"] == 0.5
    assert arms[2].curve("reward") == ([2, 4], [1.25, 1.25]) and arms[2].curve("response_length")[1] == [7.0, 7.0]
    table = markdown(summary(arms), "x.png")
    assert "| base | nothing | 25.0 [" in table and "| - | -50.0 [" in table and "| +75.0 [" in table
    with pytest.raises(InputError, match="the held-out rows of opsd"):
        summary([arms[2], replace(arms[0], rows=arms[0].rows[:3])])


def test_what_is_finished_stays_and_what_was_killed_goes_on(job, tmp_path):
    arms = ("--arms", "base,sft,opsd")
    assert job(*arms) == (["base", "sft", "opsd"], 0)
    first = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert job(*arms) == ([], 0)
    shutil.rmtree(tmp_path / "out" / "sft" / "checkpoints" / "step-000004")
    (tmp_path / "out" / "base" / "answers.jsonl").unlink()
    assert job(*arms) == (["base", "sft"], 0)
    again = json.loads((tmp_path / "out" / "ablation.json").read_text())
    for record in (first, again):
        for arm in record["arms"].values():
            del arm["training_seconds"]
    assert again["arms"] == first["arms"]
    assert job("--arms", "base,opsd,label-only") == (["label-only"], 0), "one more arm"


def test_more_steps_go_on_in_every_arm(job, tmp_path):
    assert job("--arms", "base,sft,opsd") == (["base", "sft", "opsd"], 0)
    assert job("--arms", "base,sft,opsd", "train.steps=6") == (["sft", "opsd"], 0)
    record = json.loads((tmp_path / "out" / "ablation.json").read_text())
    assert record["budget"]["steps"] == 6
    assert [arm["updates"] for arm in record["arms"].values()] == [0, 6, 6]
    assert [line["step"] for line in RunDir(tmp_path / "out" / "opsd").read("metrics")] == [1, 2, 3, 4, 5, 6]


def test_another_config_in_the_same_folder_is_refused(job, capsys):
    assert job("--arms", "base") == (["base"], 0)
    assert job("--arms", "base,sft", "train.seed=1") == ([], 2)
    assert "out/base/config.yaml: field 'train.seed': expected 0; found 1" in capsys.readouterr().err


def test_rows_that_an_arm_cannot_learn_from_are_told_before_any_arm_runs(job, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del rows[3]["answer"]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert job() == ([], 2)
    said = capsys.readouterr().err
    assert "rows.jsonl:4: field 'answer': expected an answer to learn" in said
    assert "--arms base,grpo,no-rationale,label-only,opsd leaves it out" in said
    assert not (tmp_path / "out").exists()
    assert job("data.test=null") == ([], 2)
    assert "data.test or data.validation" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("grpo:train.steps=9", "expected train.steps the same for every arm; found 'grpo:train.steps=9'"),
        (
            "sft:rollout.group_size=2",
            "expected rollout.group_size the same for every arm; found 'sft:rollout.group_size=2'",
        ),
        ("opsd:data.test=x.jsonl", "expected data.test the same for every arm; found 'opsd:data.test=x.jsonl'"),
        ("gpro:optim.lr=1", "expected an arm before the colon, one of base, sft, grpo, "),
        ("grpo:optim.lrr=1", "field 'optim.lrr': expected a key of section optim"),
    ],
)
def test_what_would_make_arms_unequal_is_refused(job, capsys, word, message):
    assert job(word) == ([], 2)
    assert message in capsys.readouterr().err


def test_settings_of_one_arm_and_of_all():
    common, own = split_arms(["optim.lr=1", "grpo:optim.lr=2", "prompts.system=a:b", "grpo:objective.ratio_clip=0.1"])
    assert common == ["optim.lr=1", "prompts.system=a:b"]
    assert own == {name: [] for name in ARMS} | {"grpo": ["optim.lr=2", "objective.ratio_clip=0.1"]}


def test_an_arm_is_a_process_of_its_own(tmp_path, monkeypatch):
    text_job(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    monkeypatch.chdir(tmp_path)
    words = [word for word in base_words(tmp_path) if not word.startswith("train.run_dir")]
    (tmp_path / "job.yaml").write_text("model:\n  path: model\n")
    assert main(["job.yaml", *words, "--arms", "base"]) == 0
    assert (tmp_path / "runs" / "job-ablation-001" / "ablation.md").exists()


@pytest.mark.parametrize(
    "status, ours, said",
    [
        (2, 2, "expected the arm to finish; found exit status 2"),
        (0, 2, "expected the arm to finish; found it was stopped"),
        (130, 130, "interrupted"),
    ],
)
def test_an_arm_that_dies_ends_the_command(tmp_path, monkeypatch, capsys, status, ours, said):
    text_job(tmp_path)
    monkeypatch.setattr(command.subprocess, "run", lambda _: SimpleNamespace(returncode=status))
    words = [word for word in base_words(tmp_path) if not word.startswith("train.run_dir")]
    (tmp_path / "job.yaml").write_text("model:\n  path: model\n")
    assert main([str(tmp_path / "job.yaml"), *words, "--out", str(tmp_path / "out")]) == ours
    assert said in capsys.readouterr().err
