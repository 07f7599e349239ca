"""Two processes do what one does: the same losses, the same weights, one checkpoint format, one set of files."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest
import torch

from opsd.train import main
from opsd.world import World
from tests.jobs import base_words, text_job
from tests.processes import train_together
from tests.test_resume import metrics, weights

ROOT = Path(__file__).parents[1]
STEPS = 8
HALF = STEPS // 2  # in the middle of an epoch
SHORT = "train.steps=3"
FSDP = ["train.parallel=fsdp"]
VARIANTS = {
    "full": [],
    "lora": ["model.adapter=lora", "teacher.lora_average=factors", SHORT],
    "reward": ["objective.kind=reward", "objective.updates_per_rollout=2", SHORT],
    "fsdp": FSDP,
    "fsdp-lora": [*FSDP, "model.adapter=lora", "teacher.lora_average=factors", SHORT],
    "fsdp-parts": [*FSDP, "objective.alpha=0.5", "teacher.kind=frozen", "engine.token_budget=40", SHORT],
    "sft": ["objective.kind=sft", "objective.teacher_view_fraction=0.5", SHORT],
}

ALONE = {"fsdp": "full", "fsdp-lora": "lora"}  # the run of one process to compare with, where it is not its namesake


def words(folder: Path, name: str, *more: str) -> list[str]:
    text_job(folder)  # model and rows, where they are missing
    return [
        *base_words(folder),
        f"train.steps={STEPS}",
        "optim.lr=1e-4",
        f"evaluate.every={HALF}",
        f"checkpoint.every={HALF}",
        "checkpoint.keep=9",
        f"train.run_dir={folder / name}",
        *more,
    ]


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Every variant on one process and on two, and runs that change the number half-way."""
    folder = tmp_path_factory.mktemp("runs")
    text_job(folder)
    config = folder / "job.yaml"
    config.write_text(f"model: {{path: {folder / 'model'}}}\n")
    two = []
    for name, more in VARIANTS.items():
        if name not in ALONE:
            assert main([str(config), *words(folder, f"{name}-1", *more)]) == 0
        two.append([str(config), *words(folder, f"{name}-2", *more)])
    first_half = f"train.steps={HALF}"
    assert main([str(config), *words(folder, "1-to-2", first_half)]) == 0
    two.append(["--resume", str(folder / "1-to-2"), *FSDP, f"train.steps={STEPS}"])
    two.append([str(config), *words(folder, "2-to-1", *FSDP, first_half)])
    train_together(2, *two)
    assert main(["--resume", str(folder / "2-to-1"), "train.parallel=ddp", f"train.steps={STEPS}"]) == 0
    return folder


def close(a: Path, b: Path) -> None:
    ours, theirs = metrics(a), metrics(b)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, len(theirs) + 1))
    for one, other in zip(ours, theirs, strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"padded_tokens"}:  # how long the longest of a batch is depends on the batch
            assert one[name] == pytest.approx(other[name], rel=1e-5, abs=1e-7), (one["step"], name)
    for name in ("evaluations.jsonl", "answers.jsonl"):
        assert (a / name).read_text() == (b / name).read_text()
    ours, theirs = weights(a), weights(b)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        torch.testing.assert_close(ours[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("name", VARIANTS)
def test_two_processes_train_as_one_does(runs, name):
    close(runs / f"{name}-2", runs / f"{ALONE.get(name, name)}-1")


@pytest.mark.parametrize("name", ["1-to-2", "2-to-1"])
def test_a_run_goes_on_with_another_number_of_processes(runs, name):
    close(runs / name, runs / "full-1")


def test_the_first_process_alone_writes(runs):
    for name in VARIANTS:
        found = sorted(p.name for p in (runs / f"{name}-2").iterdir())
        assert found == sorted(p.name for p in (runs / f"{ALONE.get(name, name)}-1").iterdir())


def torchrun(python: Path, folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    start = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port), "-m", "opsd.train"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'kernels'}"}
    return subprocess.run([python, *start, *command], cwd=folder, env=env, capture_output=True, text=True)


def test_torchrun_picks_one_run_directory_and_says_a_mistake_once(tmp_path, python):
    text_job(tmp_path)
    config = tmp_path / "job.yaml"
    config.write_text(f"model: {{path: {tmp_path / 'model'}}}\n")
    job = [word for word in base_words(tmp_path) if not word.startswith("train.run_dir")]
    done = torchrun(python, tmp_path, str(config), *job, "train.steps=2")
    assert done.returncode == 0, done.stderr
    assert [p.name for p in (tmp_path / "runs").iterdir()] == ["job-001"]
    assert len(metrics(tmp_path / "runs" / "job-001")) == 2
    odd = torchrun(python, tmp_path, str(config), *job, "train.prompts_per_step=3")
    assert odd.returncode != 0
    assert odd.stderr.count("'train.prompts_per_step': expected a multiple of the 2 processes; found 3") == 1
    assert len(list((tmp_path / "runs").iterdir())) == 1


def test_shares_are_a_partition_and_places_are_theirs():
    items = list(range(11))
    for size in (1, 2, 3, 4):
        worlds = [World(rank, size) for rank in range(size)]
        assert sorted(i for world in worlds for i in world.share(items)) == items
        for world in worlds:
            assert [world.place(i) for i in range(len(world.share(items)))] == world.share(items)
