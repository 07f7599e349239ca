"""`python -m opsd.report RUN_DIR`: a page from a real run, and a line for every mistake."""

from __future__ import annotations

import json
import os
import re
import shutil

import pytest

from opsd import report
from opsd.affect.clips import TEST, write_split
from opsd.affect.tiny import TinySize, build
from opsd.config import PromptsConfig, load_config
from opsd.data import read_examples
from opsd.page import replay
from opsd.train import train
from tests.jobs import text_job
from tests.page.pages import Reader


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    train(text_job(folder))
    return folder / "run"


@pytest.fixture
def copied(finished, tmp_path):
    """A copy of the run that a test may damage; its rows are where they were."""
    return shutil.copytree(finished, tmp_path / "run")


def page_of(run_dir, *words):
    assert report.main([str(run_dir), *words]) == 0
    return Reader.of((run_dir / "report.html").read_text(encoding="utf-8"))


def refused(capsys, *words):
    assert report.main([str(word) for word in words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def ids(page):
    return [e.text.split()[0] for e in page.all("h3")]


def test_a_text_run(finished, capsys):
    page = page_of(finished, "--clips", "3")
    assert len(page.all("article")) == 3 and len(page.data()["answers"]) == 6
    assert "3 clips drawn from the test split" in "".join(e.text for e in page.all("p"))
    titles = " ".join(e.text for e in page.all("b"))
    for title in ("Held-out", "Loss", "Accuracy", "Reward", "Format", "Length", "Entropy", "Speed", "Saved"):
        assert title in titles
    assert len(page.all("tr")) == 5, "student and teacher, before and after"
    assert "report.html" in capsys.readouterr().out


def test_the_same_seed_draws_the_same_rows_and_more_than_there_are_is_all(finished):
    first, again, other = (ids(page_of(finished, "--clips", "4", "--seed", seed)) for seed in "112")
    assert first == again != other
    assert ids(page_of(finished, "--clips", "99", "--split", "train")) == [f"row-{i}" for i in range(7)]


def test_a_run_of_videos_and_voices(tmp_path):
    rows = write_split(tmp_path, TEST, seed=0, size=3)
    data = read_examples(rows, load_config(None, ["model.path=x"]).data)
    texts = [t for row in data for t in (row.rationale, row.answer, row.subtitle, PromptsConfig().teacher_template)]
    size = TinySize(width=32, inner=64, layers=1, heads=2, vision_width=32, audio_width=32)
    build(tmp_path / "model", [t for t in texts if t], size, seed=0)
    words = [f"model.path={tmp_path / 'model'}", f"data.train={rows}", f"data.validation={rows}", "train.steps=1"]
    words += ["media.frames=4", "media.min_pixels=1024", "media.max_pixels=1024"]
    words += [f"train.run_dir={tmp_path / 'run'}", "train.prompts_per_step=2", "rollout.max_new_tokens=6"]
    train(load_config(None, [*words, "log.progress=none"]))
    page = page_of(tmp_path / "run", "--out", str(tmp_path / "run" / "report.html"))
    assert ids(page) == [row.id for row in data]
    assert len(page.all("img")) == 3 * 4 and len(page.all("audio")) == 3  # four frames of each clip, and its voice
    assert all(token["teacher"] and token["d"] >= 0 for answer in page.data()["answers"] for token in answer)
    assert (tmp_path / "run" / "report.html").stat().st_size < 1e6


def test_a_clip_that_does_not_decode_is_named_or_left_out(copied, capsys):
    text = (copied / "config.yaml").read_text()
    rows = [json.loads(line) for line in load_config(copied / "config.yaml").data.test.read_text().splitlines()]
    rows[1]["prompt"] = [{"role": "user", "content": [{"type": "audio", "audio": "broken.wav"}]}]
    (copied / "broken.wav").write_bytes(b"no sound")
    (copied / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = re.sub(r"(?m)^  test: .*", f"  test: {copied / 'test.jsonl'}", text)
    (copied / "config.yaml").write_text(text)
    assert "test.jsonl:2: field 'prompt': expected sound that can be decoded" in refused(capsys, copied)
    (copied / "config.yaml").write_text(re.sub(r"on_error: \w+", "on_error: skip", text))
    page = page_of(copied)
    assert ids(page) == [row["id"] for row in rows if row is not rows[1]]
    assert "1 more do not decode" in "".join(e.text for e in page.all("p"))


def test_curves_alone_load_no_model_and_need_no_checkpoint(copied, monkeypatch):
    shutil.rmtree(copied / "checkpoints")
    monkeypatch.setattr(replay, "load_student", None)
    page = page_of(copied, "--clips", "0")
    assert not page.all("article") and page.all("figure", class_="chart")


def test_a_run_that_logged_nothing_has_a_page(copied):
    for file in copied.glob("*.jsonl"):
        file.unlink()
    assert not page_of(copied, "--clips", "0").all("figure")


def test_a_folder_whose_name_is_no_text(finished, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/run-\xff<b>")
    shutil.copytree(finished, odd)
    assert report.main([odd, "--clips", "0"]) == 0
    with open(os.path.join(odd, "report.html"), encoding="utf-8") as file:
        assert Reader.of(file.read()).all("h1")[0].text == "run-?<b>"


def test_mistakes_are_one_line(copied, capsys, tmp_path):
    assert "config.yaml" in refused(capsys, tmp_path / "nowhere")
    line = refused(capsys, copied, "--split", "validation")
    assert (
        line == "python -m opsd.report: field '--split': expected a split of the run: test, train; found 'validation'"
    )
    assert "field '--out'" in refused(capsys, copied, "--out", tmp_path / "no" / "page.html")
    assert "field '--out'" in refused(capsys, copied, "--out", tmp_path)
    for saved in (copied / "checkpoints").glob("step-*"):
        (saved / "trainer.safetensors").write_bytes(b"")
    assert "expected an intact checkpoint" in refused(capsys, copied, "--clips", "1")
    shutil.rmtree(copied / "checkpoints")
    line = refused(capsys, copied)
    assert "expected a checkpoint to answer with" in line and "--clips 0" in line
    (copied / "metrics.jsonl").write_text("nonsense\n")
    assert "metrics.jsonl:1: expected a JSON record" in refused(capsys, copied, "--clips", "0")


def test_rows_that_are_gone_are_named(tmp_path, capsys):
    train(text_job(tmp_path, "train.steps=1"))
    (tmp_path / "rows.jsonl").unlink()
    assert "rows.jsonl: expected a readable JSONL file" in refused(capsys, tmp_path / "run")


@pytest.mark.parametrize("words", [["--clips", "-1"], ["--clips", "many"], ["--split", "dev"], []])
def test_words_that_argparse_refuses(finished, words):
    with pytest.raises(SystemExit) as stopped:
        report.main([str(finished), *words] if words else [])
    assert stopped.value.code == 2


def test_the_end_of_training_says_the_command(finished, capsys):
    report.write_report(report.RunDir(finished))
    assert f"python -m opsd.report {finished}" in capsys.readouterr().out
