"""Which checkpoint is taken, which are kept, and that what is taken is what was written."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from opsd import manifest
from opsd.checkpoint import Meta, read_meta
from opsd.config import CheckpointConfig
from opsd.errors import InputError
from opsd.run_dirs import with_run_dir
from opsd.shelf import Shelf
from opsd.train import main, train
from tests.jobs import base_words, text_job


def steps(run_dir: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of 4 steps with checkpoints after 2 and 4."""
    config = text_job(tmp_path_factory.mktemp("trained"))
    train(config)
    return config


@pytest.fixture
def copied(trained, tmp_path):
    shutil.copytree(trained.train.run_dir, tmp_path / "run", symlinks=True)
    return with_run_dir(trained, tmp_path / "run")


def pretend(folder: Path, step: int, score: float | None = None, scored: str | None = "accuracy") -> Path:
    """A sealed checkpoint without a model."""
    path = Shelf(folder).path(step)
    path.mkdir(parents=True)
    meta = Meta(step, step * 4, "0" * 64, score, scored if score is not None else None)
    (path / "trainer.json").write_text(json.dumps(vars(meta)))
    manifest.seal(path)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_every_file_is_in_the_manifest(trained):
    folder = trained.train.run_dir / "checkpoints" / "step-000004"
    said = json.loads((folder / "manifest.json").read_text())["files"]
    assert {*said, "manifest.json"} == {path.name for path in folder.iterdir()}
    assert {"model.safetensors", "trainer.safetensors", "trainer.json", "tokenizer.json"} <= set(said)
    meta = read_meta(folder)
    assert (meta.step, meta.rows, meta.score) == (4, 16, None)


def damaged_copies(path: Path):
    """A file's bytes cut at several places, and with single bits flipped."""
    whole = path.read_bytes()
    for keep in {0, 1, len(whole) // 2, len(whole) - 1}:
        yield f"cut to {keep}", whole[:keep]
    for place in {0, 7, len(whole) // 3, len(whole) // 2, len(whole) - 1} & set(range(len(whole))):
        yield f"bit of byte {place}", whole[:place] + bytes([whole[place] ^ 0x10]) + whole[place + 1 :]


def test_any_cut_any_flipped_bit_in_any_file_is_found(copied):
    folder = copied.train.run_dir / "checkpoints" / "step-000004"
    assert manifest.damage(folder) is None
    for path in [path for path in folder.iterdir() if path.name != "manifest.json"]:
        whole = path.read_bytes()
        for how, bytes_now in damaged_copies(path):
            path.write_bytes(bytes_now)
            assert path.name in str(manifest.damage(folder)), how
        path.unlink()
        assert manifest.damage(folder) == f"no {path.name}"
        path.write_bytes(whole)
    assert manifest.damage(folder) is None


def test_a_damaged_manifest_makes_no_checkpoint_pass(copied):
    """Whatever a manifest becomes, it is unreadable, says something else than is there, or still says the truth."""
    folder = copied.train.run_dir / "checkpoints" / "step-000004"
    path = folder / "manifest.json"
    whole = path.read_bytes()
    truth = json.loads(whole)
    found = 0
    for place in range(0, len(whole), 3):
        for bit in (0x01, 0x20):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            if manifest.damage(folder) is None:
                assert json.loads(path.read_bytes()) == truth
            else:
                found += 1
    assert found > len(whole) // 3
    for text in (
        "",
        "[]",
        "{}",
        '{"files": 1}',
        '{"files": {"a": 1}}',
        '{"files": {"a\\u0000b": {"bytes": 1, "sha256": ""}}}',
    ):
        path.write_text(text)
        assert manifest.damage(folder) is not None, text


@pytest.mark.parametrize("name", ["model.safetensors", "trainer.safetensors", "trainer.json", "config.json"])
def test_a_damaged_checkpoint_is_passed_over_and_set_aside(copied, trained, name, caplog):
    run_dir = copied.train.run_dir
    damaged = run_dir / "checkpoints" / "step-000004"
    whole = (damaged / name).read_bytes()
    (damaged / name).write_bytes(bytes([whole[0] ^ 1]) + whole[1:])
    train(copied, resume=True)
    assert f"{damaged} passed over: {name} is not what was written (SHA-256)" in caplog.text
    assert names(run_dir / "checkpoints") == ["damaged-step-000004", "last", "step-000002", "step-000004"]
    assert (run_dir / "checkpoints" / "damaged-step-000004" / name).read_bytes() != whole
    for file in ("model.safetensors", "trainer.safetensors"):
        ours, theirs = (c.train.run_dir / "checkpoints" / "step-000004" / file for c in (copied, trained))
        assert ours.read_bytes() == theirs.read_bytes()
    assert steps(run_dir) == [1, 2, 3, 4]


def test_a_run_whose_checkpoints_are_all_damaged_is_not_started_over_in_silence(copied, capsys):
    before = (copied.train.run_dir / "metrics.jsonl").read_text()
    for path in copied.train.run_dir.glob("checkpoints/step-*/model.safetensors"):
        path.write_bytes(b"")
    assert main(["--resume", str(copied.train.run_dir)]) == 2
    err = capsys.readouterr().err
    assert "expected an intact checkpoint" in err and "step 4: model.safetensors" in err and "step 2: " in err
    assert (copied.train.run_dir / "metrics.jsonl").read_text() == before


def test_another_format_and_another_step_are_passed_over(tmp_path, caplog):
    pretend(tmp_path, 1)
    later = pretend(tmp_path, 2)
    (later / "trainer.json").write_text((later / "trainer.json").read_text().replace('"format": 2', '"format": 3'))
    manifest.seal(later)
    shutil.copytree(Shelf(tmp_path).path(1), Shelf(tmp_path).path(3))
    assert Shelf(tmp_path).newest().step == 1
    assert "trainer.json is of step 1" in caplog.text and "expected checkpoint format 2; found 3" in caplog.text


def test_the_best_is_kept_beside_the_newest(tmp_path):
    shelf = Shelf(tmp_path)
    for step, score in enumerate([0.2, 0.9, 0.9, None, 0.5, 0.4], start=1):
        pretend(tmp_path, step, score)
    pretend(tmp_path, 7, 5.0, "loss")  # by another measure
    assert shelf.best("accuracy").step == 2, "the first of equals"
    assert shelf.best("loss").step == 7
    assert not shelf.would_be_best("accuracy", 0.9) and shelf.would_be_best("accuracy", 0.91)
    assert not shelf.would_be_best("loss", 5.0) and shelf.would_be_best("loss", 4.9)
    shelf.tidy(CheckpointConfig(keep=2, best="accuracy"))
    assert names(tmp_path) == ["best", "last", "step-000002", "step-000006", "step-000007"]
    assert (tmp_path / "best").resolve().name == "step-000002"
    shelf.tidy(CheckpointConfig(keep=2))
    assert names(tmp_path) == ["last", "step-000006", "step-000007"]


@pytest.mark.parametrize("by", ["accuracy", "loss"])
def test_a_run_saves_and_keeps_its_best_by_held_out_rows(tmp_path, by, monkeypatch):
    """Measured at steps 1 to 5, saved at 5 by its own interval: the best of the others is there all the same."""
    scores = {"accuracy": [0.0, 0.3, 0.6, 0.6, 0.1, 0.2], "loss": [9.0, 0.7, 0.2, 0.2, 0.4, 0.3]}[by]
    asked = iter(scores)
    if by == "loss":
        monkeypatch.setattr("opsd.evaluate.held_out_loss", lambda run, rows, step: next(asked))
    else:
        from opsd.evaluate import Accuracy

        monkeypatch.setattr("opsd.evaluate.wilson", lambda right, n: Accuracy(next(asked), 0.0, 1.0, n))
    rows = tmp_path / "rows.jsonl"
    words = [f"data.validation={rows}", "data.test=null", "evaluate.every=1", "evaluate.teacher=false"]
    config = text_job(
        tmp_path, *words, f"checkpoint.best={by}", "checkpoint.every=5", "checkpoint.keep=1", "train.steps=5"
    )
    train(config)
    folder = config.train.run_dir / "checkpoints"
    assert names(folder) == ["best", "last", "step-000002", "step-000005"]
    best = Shelf(folder).best(by)
    assert (best.step, best.meta.score, best.meta.scored) == (2, scores[2], by)
    assert (folder / "best").resolve() == best.path.resolve()


def test_the_held_out_loss_is_the_objectives_on_greedy_answers(tmp_path):
    """Beside a dense definition in fp64: JSD of both views' distributions along the student's greedy tokens."""
    import torch

    from opsd.answers import answer
    from opsd.engine import response_hidden
    from opsd.held_out import held_out_loss
    from opsd.opening import open_run
    from opsd.step import sample

    words = [
        "model.adapter=lora",
        "model.lora_dropout=0.5",
        "objective.alpha=0",
        f"data.validation={tmp_path}/rows.jsonl",
    ]
    with open_run(text_job(tmp_path, *words)) as run:
        with torch.no_grad():
            for name, p in run.model.trainable().items():
                if ".lora_B." in name:
                    p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(0)))
        rows = run.held_out["validation"]
        found = held_out_loss(run, rows, 3)
        group = sample(run, rows, 3, greedy=True)
        assert group.texts == answer(run.model, group.prompts, 32, run.config.rollout)
        with torch.no_grad(), run.model.mode(train=False):
            own = response_hidden(run.model, group.prompts, group.responses)
            with run.teacher.weights():
                other = response_hidden(run.model, group.views, group.responses)
            log_p, log_q = ((h @ run.model.head.weight.T).double().log_softmax(-1) for h in (own, other))
    log_m = ((log_p.exp() + log_q.exp()) / 2).log()
    jsd = ((log_p.exp() * (log_p - log_m)).sum(-1) + (log_q.exp() * (log_q - log_m)).sum(-1)) / 2
    want = torch.stack([part.mean() for part in jsd.split(group.responses.lengths)]).mean().item()
    assert found == pytest.approx(want, rel=1e-4) and want > 1e-3


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "none without data.validation"),
        (["data.validation={rows}"], "none without evaluate.every"),
    ],
)
def test_a_best_that_nothing_measures_is_refused(tmp_path, words, expected):
    words = [word.format(rows=tmp_path / "rows.jsonl") for word in words]
    with pytest.raises(InputError, match=expected):
        text_job(tmp_path, "checkpoint.best=accuracy", *words)
    both = [f"data.validation={tmp_path / 'rows.jsonl'}", "evaluate.every=1", "objective.kind=reward"]
    with pytest.raises(InputError, match="none or accuracy for objective"):
        text_job(tmp_path, "checkpoint.best=loss", *both)


def test_what_a_kill_leaves_is_tidied_and_what_others_put_there_is_not(tmp_path):
    pretend(tmp_path, 1)
    (tmp_path / ".step-000002.tmp").mkdir()
    (tmp_path / ".step-000001.old").mkdir()
    (tmp_path / ".last.tmp").symlink_to("step-000002")
    (tmp_path / ".notes").write_text("mine")
    (tmp_path / "step-notes").mkdir()
    Shelf(tmp_path).tidy(CheckpointConfig())
    assert names(tmp_path) == [".notes", "last", "step-000001", "step-notes"]


def test_a_checkpoint_has_its_name_only_when_all_of_it_is_on_the_disk(tmp_path, monkeypatch):
    synced, renamed = [], []
    real_sync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        synced.append(os.path.realpath(f"/proc/self/fd/{descriptor}"))
        real_sync(descriptor)

    def replace(old, new):
        if Path(new).name.startswith("step-"):
            inside = {str(path) for path in Path(old).rglob("*")} | {str(old)}
            renamed.append((Path(new), inside - set(synced)))
            logs = Path(new).parents[1]
            assert {str(logs / f"{name}.jsonl") for name in ("metrics", "evaluations", "samples")} <= set(synced)
            synced.clear()
        real_replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    config = text_job(tmp_path, "train.steps=1")
    train(config)
    ((path, missing),) = renamed
    assert not missing, "files and folders that were not synced before the name"
    assert str(path.parent) in synced, "the name itself"


def test_rows_that_changed_are_refused(copied, capsys, tmp_path):
    rows = Path(str(copied.data.train))
    before = rows.read_text()
    try:
        rows.write_text(before.replace("the voice is low", "the voice is high"))
        shutil.rmtree(copied.train.run_dir / "checkpoints" / "step-000004")
        assert main(["--resume", str(copied.train.run_dir)]) == 2
        assert "'data.train': expected the rows that the run began with; found others" in capsys.readouterr().err
    finally:
        rows.write_text(before)
    assert main(["--resume", str(copied.train.run_dir)]) == 0


def test_two_processes_do_not_train_in_one_run(tmp_path, capsys):
    from opsd.opening import open_run

    config = text_job(tmp_path, "train.steps=1")
    with open_run(config):
        assert main([*base_words(tmp_path), "train.steps=1", "--resume", str(config.train.run_dir)]) == 2
    assert "expected a run that no other process is training" in capsys.readouterr().err


def test_resume_auto_takes_the_newest_run_of_the_config_and_says_why_not_others(tmp_path, monkeypatch, capsys):
    text_job(tmp_path)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "job.yaml").write_text("log:\n  progress: none\n")
    words = ["job.yaml", *(w for w in base_words(tmp_path) if not w.startswith("train.run_dir")), "train.steps=1"]
    auto = [*words, "--resume", "auto"]
    assert main(auto) == 0 and steps(Path("runs/job-001")) == [1], "none to resume: begun"
    assert main([*words, "optim.lr=1e-4"]) == 0
    Path("runs/job-003").mkdir()
    assert main([*auto, "train.steps=2"]) == 0
    err = capsys.readouterr().err
    assert steps(Path("runs/job-001")) == [1, 2] and steps(Path("runs/job-002")) == [1]
    assert f"{tmp_path}/runs/job-002 passed over: optim.lr was 0.0001, is 0.001" in err
    assert f"{tmp_path}/runs/job-003 passed over: expected a run directory with config.yaml; found none" in err
    assert main([*auto, f"train.run_dir={tmp_path / 'own'}"]) == 0
    assert main([*auto, f"train.run_dir={tmp_path / 'own'}", "train.steps=2"]) == 0
    assert steps(tmp_path / "own") == [1, 2]
