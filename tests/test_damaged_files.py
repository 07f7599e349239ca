"""A run over rows with damaged files: named, or left out and counted, the same whoever decodes and when."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from opsd.affect.clips import TEST, TRAIN, write_split
from opsd.affect.embedded import vocabulary
from opsd.affect.tiny import TinySize, build
from opsd.config import Config, load_config
from opsd.data import order
from opsd.errors import InputError
from opsd.log import RunDir
from opsd.opening import open_run
from opsd.train import train

SIZE = TinySize(width=32, inner=64, layers=1, heads=2, vision_width=32, audio_width=32)
DAMAGED = (2, 3, 8)  # of 9 rows; the one after the last is the first


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("damaged")
    for split, size in ((TRAIN, 9), (TEST, 6)):
        rows = [json.loads(line) for line in write_split(made, split, 0, size).read_text().splitlines()]
        for i in DAMAGED:
            if i < len(rows):
                clip = made / rows[i]["prompt"][0]["content"][0]["video"]
                clip.write_bytes(clip.read_bytes()[:5000] if i % 2 else b"no video")
    build(made / "model", vocabulary(), SIZE, seed=0)
    return made


def config(folder: Path, run: Path, *words: str) -> Config:
    media = ["media.frames=2", "media.min_pixels=2304", "media.max_pixels=2304"]
    data = [
        f"data.train={folder / 'train.jsonl'}",
        f"data.test={folder / 'test.jsonl'}",
        f"model.path={folder / 'model'}",
    ]
    train = ["train.steps=5", "train.prompts_per_step=4", "train.threads=1", "rollout.group_size=2", "optim.lr=1e-3"]
    rest = ["rollout.max_new_tokens=3", "log.progress=none", f"train.run_dir={run}", "checkpoint.every=2"]
    return load_config(None, [*media, *data, *train, *rest, *words])


def lines(run: Path, name: str) -> list[dict[str, Any]]:
    timed = ("seconds", "per_second", "memory", "cache")  # and what is counted since the process started
    return [{k: v for k, v in one.items() if not any(t in k for t in timed)} for one in RunDir(run).read(name)]


def test_by_default_they_are_named_before_the_first_step(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError) as caught:
        train(config(folder, tmp_path / "run"))
    told = str(caught.value)
    for i in DAMAGED:
        assert f"train.jsonl:{i + 1}: field 'prompt[0].content[0].video': expected a video that can be decoded" in told


@pytest.fixture(scope="module")
def reference(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    train(config(folder, run, "data.on_error=skip"))
    return run


def test_with_skip_the_next_row_stands_in_and_it_is_counted(folder: Path, tmp_path: Path, reference: Path) -> None:
    skipping = config(folder, tmp_path / "run", "data.on_error=skip", "prompts.verify=false")
    with open_run(skipping) as run:
        for step in range(5):
            planned = order(9, 4, step, skipping.train.seed)
            used = [run.train.index(row) for row in run.rows(step)]
            assert used == [{2: 4, 3: 4, 8: 0}.get(i, i) for i in planned]
            assert run.replaced == sum(i in DAMAGED for i in planned)
            assert lines(reference, "metrics")[step]["skipped_rows"] == run.replaced
    assert [(e["n"], e["skipped_rows"]) for e in lines(reference, "evaluations")] == [(4, 2)] * 4


@pytest.mark.parametrize("words", [["media.workers=0"], ["prompts.verify=false", "prompts.cache_mib=0"]])
def test_nobody_sees_who_decodes_and_when(folder: Path, tmp_path: Path, reference: Path, words: list[str]) -> None:
    train(config(folder, tmp_path / "run", "data.on_error=skip", *words))
    for name in ("metrics", "evaluations"):
        assert lines(tmp_path / "run", name) == lines(reference, name)


def test_a_resumed_run_leaves_out_the_same(folder: Path, tmp_path: Path, reference: Path) -> None:
    words = ["data.on_error=skip", "prompts.verify=false"]
    train(config(folder, tmp_path / "run", *words, "train.steps=2"))
    train(config(folder, tmp_path / "run", *words), resume=True)
    assert lines(tmp_path / "run", "metrics") == lines(reference, "metrics")


def test_no_row_left_is_an_error(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "clips").mkdir()
    rows = (folder / "train.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[i] for i in DAMAGED))
    for i in DAMAGED:
        name = json.loads(rows[i])["prompt"][0]["content"][0]["video"]
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    words = ["data.on_error=skip", f"data.train={tmp_path / 'train.jsonl'}", "data.test=null"]
    with pytest.raises(InputError, match=r"train\.jsonl: expected a row whose files decode; found none"):
        train(config(folder, tmp_path / "run", *words))
