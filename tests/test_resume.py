"""Kill a run, resume it: everything that follows equals the uninterrupted run, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from opsd.errors import InputError
from opsd.run_dirs import with_run_dir
from opsd.shelf import Shelf
from opsd.train import main, train
from tests.jobs import base_words, text_job

# What a clock or the process decides (tokens: what a cache still held); everything else must repeat.
MEASURED = ("seconds", "peak_memory_mib", "computed_tokens", "saved_tokens", "memory_retries")


def metrics(run_dir: Path) -> list[dict]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in r.items() if not _measured(k)} for r in records]


def _measured(name: str) -> bool:
    return name in MEASURED or name.endswith("per_second") or name.startswith(("teacher_cache", "feature_cache"))


def weights(run_dir: Path) -> dict[str, torch.Tensor]:
    last = run_dir / "checkpoints" / "last"
    names = [p.name for p in last.glob("*.safetensors")]
    return {f"{n}:{k}": t for n in names for k, t in load_file(last / n).items()}


def assert_same(a: Path, b: Path, files: tuple[str, ...] = ("evaluations.jsonl", "samples.jsonl")) -> None:
    assert metrics(a) == metrics(b)
    for name in files:
        assert (a / name).read_text() == (b / name).read_text()
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name


VARIANTS = {
    "full-ema": [],
    "full-frozen": ["teacher.kind=frozen"],
    "full-frozen-disk": [
        "teacher.kind=frozen",
        "engine.teacher_cache=disk",
        "engine.teacher_cache_dir={folder}/teacher",
    ],
    "lora-frozen": ["model.adapter=lora", "teacher.kind=frozen"],
    "lora-dense": ["model.adapter=lora", "model.lora_dropout=0.1"],
    "lora-factors": ["model.adapter=lora", "teacher.lora_average=factors"],
    "sft": ["objective.kind=sft", "objective.teacher_view_fraction=0.5"],
    "reward": ["objective.kind=reward", "objective.updates_per_rollout=2"],
}


@pytest.mark.parametrize("words", VARIANTS.values(), ids=VARIANTS.keys())
def test_a_run_stopped_after_a_checkpoint_goes_on_as_if_never_stopped(tmp_path, words):
    words = [word.format(folder=tmp_path) for word in words]
    whole = text_job(tmp_path, *words, "checkpoint.keep=9")
    train(whole)
    # the state a kill between step 3's log line and its checkpoint leaves behind
    cut = tmp_path / "cut"
    shutil.copytree(whole.train.run_dir, cut, symlinks=True)
    shutil.rmtree(cut / "checkpoints" / "step-000004")
    (cut / "checkpoints" / ".step-000004.tmp").mkdir()
    with (cut / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')
    train(with_run_dir(whole, cut), resume=True)
    assert len(metrics(cut)) == 4
    assert_same(cut, whole.train.run_dir)


def test_sigkill_in_the_middle_then_resume_from_the_command_line(tmp_path):
    whole = text_job(tmp_path, "train.steps=10")
    train(whole)
    env = dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path))
    command = [sys.executable, "-m", "opsd.train"]
    killed = tmp_path / "killed"
    words = [w for w in base_words(tmp_path) if not w.startswith(("train.run_dir", "train.steps"))]
    process = subprocess.Popen([*command, *config_file(tmp_path, words, killed)], env=env, stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (killed / "checkpoints" / "step-000002").exists():
        assert process.poll() is None and time.monotonic() < deadline, "the run ended before it could be killed"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (killed / "checkpoints" / "step-000010").exists(), "the run was over before the kill"
    done = subprocess.run([*command, "--resume", str(killed)], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert_same(killed, whole.train.run_dir)


def config_file(folder: Path, words: list[str], run_dir: Path) -> list[str]:
    (folder / "job.yaml").write_text("train:\n  steps: 10\n")
    return [str(folder / "job.yaml"), *words, f"train.run_dir={run_dir}"]


def test_resume_refuses_another_config_and_allows_longer_training(tmp_path):
    config = text_job(tmp_path, "train.steps=2")
    train(config)
    with pytest.raises(InputError) as caught:
        train(text_job(tmp_path, "train.steps=2", "optim.lr=5e-4"), resume=True)
    assert "config.yaml" in str(caught.value) and "optim.lr" in str(caught.value)
    assert "0.001" in str(caught.value) and "0.0005" in str(caught.value)
    train(text_job(tmp_path, "train.steps=4"), resume=True)
    assert [m["step"] for m in metrics(config.train.run_dir)] == [1, 2, 3, 4]


def test_a_run_that_already_exists_is_not_overwritten(tmp_path):
    config = text_job(tmp_path, "train.steps=1")
    train(config)
    before = (config.train.run_dir / "metrics.jsonl").read_text()
    with pytest.raises(InputError, match="--resume"):
        train(config)
    assert (config.train.run_dir / "metrics.jsonl").read_text() == before


def test_checkpoints_load_in_plain_transformers_and_peft(tmp_path):
    from peft import PeftModel
    from transformers import AutoTokenizer, LlamaForCausalLM

    full = text_job(tmp_path, "train.steps=1")
    run = train(full)
    last = full.train.run_dir / "checkpoints" / "last"
    loaded = LlamaForCausalLM.from_pretrained(last)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, run.model.module.model.layers[0].mlp.up_proj.weight)
    assert AutoTokenizer.from_pretrained(last).eos_token == "<end>"

    lora = text_job(tmp_path, "train.steps=1", "model.adapter=lora", f"train.run_dir={tmp_path / 'lora'}")
    run = train(lora)
    base = LlamaForCausalLM.from_pretrained(tmp_path / "model")
    adapted = PeftModel.from_pretrained(base, lora.train.run_dir / "checkpoints" / "last").eval()
    ids = torch.tensor([[5, 6, 7]])
    torch.testing.assert_close(adapted(input_ids=ids).logits, run.model.module(input_ids=ids).logits)


def test_only_the_newest_checkpoints_are_kept_and_no_pickle_is_written(tmp_path):
    config = text_job(tmp_path, "checkpoint.every=1", "checkpoint.keep=2")
    train(config)
    folder = config.train.run_dir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == ["last", "step-000003", "step-000004"]
    assert Shelf(folder).newest().step == 4
    suffixes = {p.suffix for p in folder.rglob("*") if p.is_file()}
    assert suffixes <= {".safetensors", ".json", ".jinja", ".md", ".txt"}


def test_a_damaged_checkpoint_is_said_by_name(tmp_path):
    config = text_job(tmp_path, "train.steps=2")
    train(config)
    (config.train.run_dir / "checkpoints" / "step-000002" / "trainer.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(InputError) as caught:
        train(text_job(tmp_path, "train.steps=4"), resume=True)
    assert "trainer.safetensors" in str(caught.value)


def test_a_kill_while_old_checkpoints_are_dropped_or_linked_costs_nothing(tmp_path):
    config = text_job(tmp_path, "checkpoint.every=1", "checkpoint.keep=3")
    train(config)
    folder = config.train.run_dir / "checkpoints"
    (folder / "step-000002" / "trainer.json").unlink()  # half dropped
    (folder / "step-notes").mkdir()  # somebody's own
    (folder / "last").unlink()
    (folder / "last").symlink_to("step-000003")  # killed before the link moved
    assert Shelf(folder).newest().step == 4
    assert (folder / "last").resolve().name == "step-000004"
    train(text_job(tmp_path, "checkpoint.every=1", "checkpoint.keep=3", "train.steps=5"), resume=True)
    names = sorted(p.name for p in folder.iterdir())
    assert names == ["last", "step-000003", "step-000004", "step-000005", "step-notes"]


def test_a_longer_run_stays_longer_when_it_is_resumed_again(tmp_path):
    train(text_job(tmp_path, "train.steps=2"))
    longer = text_job(tmp_path, "train.steps=6")
    train(longer, resume=True)
    shutil.rmtree(longer.train.run_dir / "checkpoints" / "step-000006")
    assert main(["--resume", str(longer.train.run_dir)]) == 0
    assert [m["step"] for m in metrics(longer.train.run_dir)] == [1, 2, 3, 4, 5, 6]
    with pytest.raises(InputError, match=r"train\.steps"):
        train(text_job(tmp_path, "train.steps=2"), resume=True)
