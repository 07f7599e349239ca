"""The config file, the command line over it, and every way to get them wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import ValidationError

from opsd.config import Config, dump_config, load_config
from opsd.errors import InputError, InputErrors
from opsd.sections import Section

MODEL = "model:\n  path: some/model\n"


def written(folder: Path, text: str) -> Path:
    path = folder / "run.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def refusal(folder: Path, text: str, *overrides: str) -> str:
    """The message of the InputError, with the folder cut out."""
    with pytest.raises(InputError) as caught:
        load_config(written(folder, text), overrides)
    return str(caught.value).replace(f"{folder}/", "")


def test_values_come_from_defaults_then_base_then_file_then_command_line(tmp_path: Path) -> None:
    file = written(tmp_path, MODEL + "optim:\n  lr: 1e-4\n  weight_decay: 0.1\nlog:\n")
    base = {"optim": {"lr": 3e-4, "eps": 1e-6, "weight_decay": 0.3}}
    config = load_config(file, ["optim.weight_decay=0.2", "rollout.group_size=8"], base)
    assert config.optim.lr == 1e-4  # YAML 1.1 reads 1e-4 as text
    assert config.optim.eps == 1e-6
    assert config.optim.weight_decay == 0.2
    assert config.rollout.group_size == 8
    assert config.optim.betas == (0.9, 0.999)


def test_defaults_are_the_paper(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, MODEL))
    assert (config.objective.divergence, config.objective.beta, config.objective.temperature) == (
        "jsd",
        0.5,
        1.0,
    )
    assert (config.teacher.kind, config.teacher.mu, config.optim.lr) == ("ema", 0.999, 1e-6)
    assert (config.prompts.max_prompt_tokens, config.rollout.max_new_tokens) == (24576, 512)


def test_relative_paths_belong_to_the_file_or_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home, here = tmp_path / "job", tmp_path / "here"
    (home / "weights").mkdir(parents=True)
    here.mkdir()
    monkeypatch.chdir(here)
    file = written(home, "data:\n  train: a.jsonl\n  test: /abs/t.jsonl\nmodel:\n  path: weights\n")
    config = load_config(file, ["data.validation=v.jsonl", "train.run_dir=2026"])
    assert config.data.train == home / "a.jsonl"
    assert config.data.test == Path("/abs/t.jsonl")
    assert config.data.validation == here / "v.jsonl"
    assert config.train.run_dir == here / "2026"  # a path, though YAML reads a number
    assert config.model.path == str(home / "weights")
    assert load_config(file, ["model.path=org/name"]).model.path == "org/name"  # a hub id stays one


def test_what_is_dumped_loads_back_equal_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = [
        "model.path=./weights",
        "data.labels=[happy, 'no', traurig äöü]",
        "optim.lr=1e-5",
        "optim.max_grad_norm=null",
        "model.lora_targets=[q_proj, v_proj]",
        "data.train=rows.jsonl",
        'prompts.subtitle_template=Says: "{subtitle}"\t#1',
        "train.run_dir=~/runs/a",
    ]
    config = load_config(None, overrides)
    assert config.prompts.subtitle_template == 'Says: "{subtitle}"\t#1'
    (tmp_path / "deep").mkdir()
    dump_config(config, tmp_path / "deep" / "config.yaml")
    monkeypatch.chdir("/")
    assert load_config(tmp_path / "deep" / "config.yaml") == config
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["config.yaml"]


def test_the_model_needs_a_path_and_the_config_does_not_change(tmp_path: Path) -> None:
    assert refusal(tmp_path, "train:\n  steps: 3\n") == (
        "run.yaml: field 'model.path': expected a value; found nothing"
    )
    config = load_config(written(tmp_path, MODEL))
    with pytest.raises(ValidationError):
        config.train.steps = 4  # type: ignore[misc]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "rollout:\n  temperature: 1e-300\n",
            "run.yaml:4: field 'rollout.temperature': expected a value >= 1e-06; found '1e-300'",
        ),
        (
            "objective:\n  temperature: 1e+300\n",
            "run.yaml:4: field 'objective.temperature': expected a value <= 1000000.0; found '1e+300'",
        ),
        (
            "optim:\n  lrr: 1\n",
            "run.yaml:4: field 'optim.lrr': expected a key of section optim, one of kind, lr, betas, eps, "
            "weight_decay, max_grad_norm, in_backward, schedule, warmup_steps; found an unknown key (did you "
            "mean 'lr'?)",
        ),
        (
            "optim:\n  lr: 1\n  mu: 1\n",
            "run.yaml:5: field 'optim.mu': expected a key of section optim, one of kind, lr, betas, eps, "
            "weight_decay, max_grad_norm, in_backward, schedule, warmup_steps; found an unknown key (did you "
            "mean 'teacher.mu'?)",
        ),
        (
            "optm:\n  lr: 1\n",
            "run.yaml:3: field 'optm': expected a section, one of data, prompts, media, model, "
            "engine, rollout, teacher, objective, rewards, optim, checkpoint, log, evaluate, train; "
            "found an unknown section (did you mean 'optim'?)",
        ),
        (
            "train:\n  steps: ten\n",
            "run.yaml:4: field 'train.steps': expected a whole number; found 'ten'",
        ),
        (
            "train:\n  steps: 1.5\n",
            "run.yaml:4: field 'train.steps': expected a whole number; found 1.5",
        ),
        (
            "train:\n  steps: true\n",
            "run.yaml:4: field 'train.steps': expected a whole number; found True",
        ),
        (
            "optim:\n  lr: true\n",
            "run.yaml:4: field 'optim.lr': expected a number; found True",
        ),
        (
            "optim:\n  eps: .inf\n",
            "run.yaml:4: field 'optim.eps': expected a finite number; found inf",
        ),
        (
            "optim:\n  lr: .nan\n",
            "run.yaml:4: field 'optim.lr': expected a value >= 0.0; found nan",
        ),
        (
            "optim:\n  betas: [0.9]\n",
            "run.yaml:4: field 'optim.betas': expected a list of two numbers; found [0.9]",
        ),
        (
            "optim:\n  betas: [0.9, 1]\n",
            "run.yaml:4: field 'optim.betas': expected two numbers in [0, 1); found [0.9, 1.0]",
        ),
        (
            "prompts:\n  verify: 1\n",
            "run.yaml:4: field 'prompts.verify': expected true or false; found 1",
        ),
        (
            "model: 3\n",
            "run.yaml:3: field 'model': expected each key once; found it again, first on line 1",
        ),
        (
            "data: rows.jsonl\n",
            "run.yaml:3: field 'data': expected keys with values; found 'rows.jsonl'",
        ),
        (
            "data:\n  train: 3\n",
            "run.yaml:4: field 'data.train': expected a path; found 3",
        ),
        (
            "data:\n  labels: []\n",
            "run.yaml:4: field 'data.labels': expected a list of non-empty labels, or null; found []",
        ),
        (
            "data:\n  labels: [a, a]\n",
            "run.yaml:4: field 'data.labels': expected labels that differ; found ['a', 'a']",
        ),
        (
            "data:\n  labels: happy\n",
            "run.yaml:4: field 'data.labels': expected a list; found 'happy'",
        ),
        (
            "teacher:\n  kind: emma\n",
            "run.yaml:4: field 'teacher.kind': expected one of ema, frozen, live; found 'emma' (did you mean 'ema'?)",
        ),
        (
            "teacher:\n  mu: 1\n",
            "run.yaml:4: field 'teacher.mu': expected a value < 1.0; found 1",
        ),
        (
            "teacher:\n  mu: -0.1\n",
            "run.yaml:4: field 'teacher.mu': expected a value >= 0.0; found -0.1",
        ),
        (
            "teacher:\n  lora_average: factors\n",
            "run.yaml:4: field 'teacher.lora_average': expected dense when model.adapter is not lora; found 'factors'",
        ),
        (
            "objective:\n  beta: 1\n",
            "run.yaml:4: field 'objective.beta': expected a number from 1e-6 to 1 - 1e-6 for divergence jsd; found 1.0",
        ),
        (
            "objective:\n  teacher_view_fraction: 0.5\n",
            "run.yaml:4: field 'objective.teacher_view_fraction': expected 0 for objective.kind distill; found 0.5",
        ),
        (
            "objective:\n  updates_per_rollout: 2\n",
            "run.yaml:4: field 'objective.updates_per_rollout': expected 1 for objective.kind distill; found 2",
        ),
        (
            "engine:\n  token_budget: 0\n",
            "run.yaml:4: field 'engine.token_budget': expected a value >= 1 or one of auto; found 0",
        ),
        (
            "prompts:\n  teacher_template: Look!\n",
            "run.yaml:4: field 'prompts.teacher_template': expected a template that contains "
            "{rationale}; found 'Look!'",
        ),
        (
            "prompts:\n  subtitle_template: x\n",
            "run.yaml:4: field 'prompts.subtitle_template': expected a template that contains {subtitle}; found 'x'",
        ),
        (
            "model: {path: [}\n",
            "run.yaml:3: expected valid YAML; found ",
        ),
    ],
)
def test_a_mistake_in_the_file_is_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert refusal(tmp_path, MODEL + text).startswith(message)
    assert "\n" not in refusal(tmp_path, MODEL + text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lr", "command line: expected section.key=value; found 'lr'"),
        ("lr=1", "command line: expected section.key=value; found 'lr=1'"),
        ("optim.lr=", "command line: field 'optim.lr': expected a number; found None"),
        ("optim.lr=[", "command line: field 'optim.lr': expected a YAML value; found '['"),
        (
            "optim.learning_rate=1",
            "command line: field 'optim.learning_rate': expected a key of section optim",
        ),
        (
            "model.dtype=bf16",
            "command line: field 'model.dtype': expected one of float32, bfloat16; found 'bf16'",
        ),
        (
            "model.lora_targets=all",
            "command line: field 'model.lora_targets': expected one of all-linear or a list or a mapping; ",
        ),
        ("train.seed=-1", "command line: field 'train.seed': expected a value >= 0; found -1"),
        ("rollout.stop=[a, '']", "command line: field 'rollout.stop': expected a list of strings that are not empty"),
        (
            'rollout.stop=["\\ufffd"]',
            "command line: field 'rollout.stop': expected a list of strings that are not empty",
        ),
        ("rollout.min_p=1.5", "command line: field 'rollout.min_p': expected a value <= 1.0; found 1.5"),
    ],
)
def test_a_mistake_on_the_command_line_says_so(tmp_path: Path, override: str, message: str) -> None:
    assert refusal(tmp_path, MODEL, override).startswith(message)


def test_words_that_yaml_reads_as_booleans_are_refused_with_the_remedy(tmp_path: Path) -> None:
    message = refusal(tmp_path, MODEL + "data:\n  labels: [yes, no]\n")
    assert message.startswith("run.yaml:4: field 'data.labels': expected text; found [True, False] (quote it")


def test_all_problems_come_at_once_in_file_order(tmp_path: Path) -> None:
    with pytest.raises(InputErrors) as caught:
        load_config(written(tmp_path, MODEL + "train:\n  stepps: 1\noptim:\n  lr: x\n"))
    assert [problem.line for problem in caught.value.problems] == [4, 6]
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(("content", "found"), [(None, "No such file"), (b"\xff\xfe", "not UTF-8"), (b"- 1\n", "[1]")])
def test_a_file_that_is_no_config(tmp_path: Path, content: bytes | None, found: str) -> None:
    path = tmp_path / "run.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"run\.yaml.*expected") as caught:
        load_config(path)
    assert found in str(caught.value)


def test_every_key_says_what_it_does() -> None:
    sections = [field.annotation for field in Config.model_fields.values()]
    assert len(sections) == 14
    for section in sections:
        assert issubclass(section, Section)
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name} has no description"
