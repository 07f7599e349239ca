"""Every mistake of a user ends with one clear message and status 2: no traceback, nothing lost."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd import evaluate
from opsd.train import main, train
from tests.jobs import base_words, text_job


@pytest.fixture
def job(tmp_path):
    text_job(tmp_path)
    (tmp_path / "job.yaml").write_text("")
    return tmp_path


def run(folder: Path, *words: str, capsys, status: int = 2) -> str:
    """stderr of the command; the run directory holds no checkpoint afterwards unless the run went well."""
    assert main([str(folder / "job.yaml"), *base_words(folder), *words]) == status
    err = capsys.readouterr().err
    assert "Traceback" not in err
    return err


def edit_row(folder: Path, line: int, **changes: object) -> Path:
    path = folder / "rows.jsonl"
    rows = [json.loads(text) for text in path.read_text().splitlines()]
    rows[line - 1].update(changes)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_unknown_key_names_the_nearest(job, capsys):
    file = job / "job.yaml"
    file.write_text("train:\n  steps: 1\noptim:\n  learning_rate: 1e-3\n  lrr: 1e-3\n")
    assert main([str(file), *base_words(job)]) == 2
    err = capsys.readouterr().err
    assert f"{file}:5" in err and "optim.lrr" in err and "'lr'" in err


@pytest.mark.parametrize(
    "changes, expected",
    [
        ({"rationale": "  "}, ["rows.jsonl:3", "rationale"]),
        ({"label": "hapy"}, ["rows.jsonl:3", "label", "'hapy'", "happy"]),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "no.png"}]}]},
            ["rows.jsonl:3", "no.png"],
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "image", "image": "bad.png"}]}]},
            ["rows.jsonl:3", "bad.png"],
        ),
        (
            {"prompt": [{"role": "user", "content": [{"type": "audio", "audio": "bad.png"}]}]},
            ["rows.jsonl:3", "bad.png"],
        ),
        ({"prompt": "a " * 80}, ["rows.jsonl:3", "60", "8"]),
    ],
    ids=[
        "empty rationale",
        "label",
        "missing medium",
        "undecodable image",
        "undecodable audio",
        "long prompt",
    ],
)
def test_a_bad_row_is_named_before_the_first_step(job, capsys, changes, expected):
    (job / "bad.png").write_bytes(b"this is not an image")
    edit_row(job, 3, **changes)
    err = run(job, "data.labels=[sad, happy, angry]", "prompts.max_prompt_tokens=60", capsys=capsys)
    for text in expected:
        assert text in err
    assert not (job / "run" / "metrics.jsonl").exists()


def test_empty_dataset(job, capsys):
    (job / "rows.jsonl").write_text("\n")
    assert "rows.jsonl" in run(job, capsys=capsys)


def test_rows_without_what_the_objective_reads(job, capsys):
    edit_row(job, 2, answer=None)
    err = run(job, "objective.kind=sft", capsys=capsys)
    assert "rows.jsonl:2" in err and "'answer'" in err
    edit_row(job, 4, label=None)
    err = run(job, "objective.kind=reward", f"train.run_dir={job / 'second'}", capsys=capsys)
    assert "rows.jsonl:4" in err and "'label'" in err


def test_a_model_without_the_needed_head(job, capsys):
    from transformers import LlamaConfig, LlamaModel

    config = LlamaConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=40
    )
    LlamaModel(config).save_pretrained(job / "headless")
    assert main([str(job / "job.yaml"), *base_words(job), f"model.path={job / 'headless'}"]) == 2
    err = capsys.readouterr().err
    assert "model.path" in err and "output head" in err and "LlamaModel" in err


def test_a_model_whose_logits_are_not_what_its_config_says(job, capsys):
    """A Llama does not read a softcap: the loss would bend logits that the model samples from as they are."""
    file = job / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "final_logit_softcapping": 30.0}))
    assert "others in LlamaForCausalLM, whose config says final_logit_softcapping=30.0" in run(job, capsys=capsys)


def test_code_that_comes_with_a_model_is_not_run_unasked(job, capsys):
    file = job / "model" / "config.json"
    own = {"model_type": "llama_of_somebody", "auto_map": {"AutoConfig": "own.Config", "AutoModelForCausalLM": "own.M"}}
    file.write_text(json.dumps({**json.loads(file.read_text()), **own}))
    (job / "model" / "own.py").write_text(f"open({str(job / 'ran')!r}, 'w')")
    err = run(job, capsys=capsys)
    assert "model.trust_remote_code" in err and "own.Config" in err
    assert not (job / "ran").exists()


def test_no_model_there(job, capsys):
    assert main([str(job / "job.yaml"), *base_words(job), f"model.path={job / 'nothing'}"]) == 2
    err = capsys.readouterr().err
    assert "model.path" in err and "nothing" in err


def test_resume_with_another_config_and_without_a_run(job, capsys):
    train(text_job(job, "train.steps=1"))
    assert main([str(job / "job.yaml"), *base_words(job), "optim.lr=1", "--resume", str(job / "run")]) == 2
    assert "optim.lr" in capsys.readouterr().err
    assert main(["--resume", str(job / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_a_place_that_cannot_be_written(job, capsys):
    (job / "file").write_text("")
    err = run(job, f"train.run_dir={job / 'file' / 'run'}", capsys=capsys)
    assert str(job / "file") in err


def test_full_disk_while_saving_keeps_the_checkpoint_before(job, capsys, monkeypatch):
    from safetensors import SafetensorError

    from opsd import checkpoint

    whole = checkpoint.save_file
    calls = []

    def full_at_the_second(tensors, path):
        calls.append(path)
        if len(calls) == 2:
            raise SafetensorError("I/O error: No space left on device (os error 28)")
        whole(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", full_at_the_second)
    err = run(job, capsys=capsys)
    assert "No space left" in err and "step-000004" in err
    monkeypatch.undo()
    assert main(["--resume", str(job / "run")]) == 0  # goes on from step 2, which was not touched
    steps = [json.loads(line)["step"] for line in (job / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4]


def test_full_disk_while_evaluating(job, capsys):
    train(text_job(job, "train.steps=1"))
    capsys.readouterr()
    words = [str(job / "run"), "--data", str(job / "rows.jsonl"), "--out", "/dev/full"]
    assert evaluate.main(words) == 2
    assert "No space left" in capsys.readouterr().err
    assert evaluate.main([str(job / "run"), "--data", str(job / "gone.jsonl")]) == 2
    assert "gone.jsonl" in capsys.readouterr().err


def test_evaluate_writes_answers_without_reading_rationales(job, capsys):
    train(text_job(job, "train.steps=1"))
    rows = [json.loads(text) for text in (job / "rows.jsonl").read_text().splitlines()]
    bare = job / "bare.jsonl"
    bare.write_text(
        "".join(json.dumps({"id": r["id"], "prompt": r["prompt"], "label": r["label"]}) + "\n" for r in rows)
    )
    assert evaluate.main([str(job / "run"), "--data", str(bare)]) == 0
    assert "accuracy without rationale" in capsys.readouterr().out
    answers = [json.loads(text) for text in (job / "run" / "predictions-bare.jsonl").read_text().splitlines()]
    assert [a["id"] for a in answers] == [r["id"] for r in rows]
    assert all(set(a) == {"id", "response", "answer", "label"} for a in answers)


def test_debug_shows_the_traceback(job):
    from opsd.errors import InputError

    (job / "rows.jsonl").write_text("\n")
    with pytest.raises(InputError):
        main([str(job / "job.yaml"), *base_words(job), "--debug"])


@pytest.mark.parametrize(
    "word, expected",
    [
        ("model.device=nowhere", ["model.device", "nowhere"]),
        ("model.attention=fast", ["model.attention", "fast"]),
        ("model.freeze=[model]", ["model.freeze", "something left to train"]),
        ("model.freeze=[visual]", ["model.freeze", "'visual'"]),
        ("objective.backend=triton", ["objective", "triton"]),
        ("train.steps=2020-13-45", ["train.steps"]),
        ("train.seed=99999999999999999999", ["train.seed"]),
        ("data.test=~nobody-here/rows.jsonl", ["~nobody-here"]),
    ],
)
def test_settings_that_do_not_work_here(job, capsys, word, expected):
    err = run(job, word, capsys=capsys)
    for text in expected:
        assert text in err


@pytest.mark.parametrize("targets", ["[nothing]", "[q_proj, lm_head]", "[]"])
def test_adapter_targets_that_do_not_work(job, capsys, targets):
    err = run(job, "model.adapter=lora", f"model.lora_targets={targets}", capsys=capsys)
    assert "model.lora_targets" in err


def test_held_out_rows_without_labels(job, capsys):
    path = job / "unlabelled.jsonl"
    path.write_text('{"id": "a", "prompt": "the clip"}\n')
    err = run(job, f"data.test={path}", capsys=capsys)
    assert "unlabelled.jsonl" in err and "'label'" in err


def test_weights_that_are_not_there(job, capsys):
    """An untied head that the file does not hold would be a random one."""
    file = job / "model" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "tie_word_embeddings": False}))
    assert "lm_head.weight" in run(job, capsys=capsys)


def test_other_families_are_refused_by_name(job, capsys):
    from transformers import MistralConfig, MistralForCausalLM

    config = MistralConfig(
        vocab_size=40, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=8,
    )  # fmt: skip
    MistralForCausalLM(config).save_pretrained(job / "windowed")
    err = run(job, f"model.path={job / 'windowed'}", capsys=capsys)
    assert "one of the families llama" in err and "MistralForCausalLM: a decoder of type mistral" in err


def test_no_chat_template(job, capsys):
    (job / "model" / "chat_template.jinja").unlink()
    assert "chat template" in run(job, capsys=capsys)


def test_a_users_own_empty_folder_survives_a_failed_start(job, capsys):
    (job / "run").mkdir()
    run(job, "model.device=nowhere", capsys=capsys)
    assert (job / "run").is_dir()


def breaks(monkeypatch, what: str, steps: set[int]) -> None:
    """The loss, or the gradient alone, is no number in these steps (counted from 1)."""
    from opsd.objectives.distill import distill_loss
    from opsd.optim import Optimizer

    done = []
    whole = Optimizer.step
    monkeypatch.setattr(Optimizer, "step", lambda self, *args: done.append(1) or whole(self, *args))

    def broken(hidden, *rest):
        now = len(done) + 1 in steps
        if what == "grad_norm" and now:
            hidden.register_hook(lambda grad: grad * float("inf"))
        loss, sums = distill_loss(hidden, *rest)
        return (loss + float("nan") if what == "loss" and now else loss), sums

    monkeypatch.setattr("opsd.step.distill_loss", broken)


@pytest.mark.parametrize("what", ["loss", "grad_norm"])
def test_steps_that_are_no_numbers_are_left_out_counted_and_end_the_run_after_some(job, capsys, monkeypatch, what):
    breaks(monkeypatch, what, {2, 3, 4})
    err = run(job, "checkpoint.every=1", "checkpoint.keep=9", "train.max_skipped_updates=2", capsys=capsys)
    assert "'train.max_skipped_updates': expected a finite loss and gradient; found none in 3 updates" in err
    saved = {path.parent.name: path.read_bytes() for path in (job / "run").glob("checkpoints/step-*/model.safetensors")}
    assert sorted(saved) == ["step-000001", "step-000002", "step-000003"], "step 4 ended before it was saved"
    assert len(set(saved.values())) == 1, "weights stay as they are, to the bit"
    lines = [json.loads(line) for line in (job / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["skipped_updates"] for line in lines] == [0.0, 1.0, 1.0, 1.0]


def test_a_run_goes_on_after_steps_that_are_no_numbers(job, capsys, monkeypatch):
    breaks(monkeypatch, "loss", {1, 3})  # not in a row: the count begins again
    words = ["train.max_skipped_updates=1", "log.every=4", "checkpoint.every=1", "checkpoint.keep=9"]
    run(job, *words, capsys=capsys, status=0)
    (line,) = [json.loads(text) for text in (job / "run" / "metrics.jsonl").read_text().splitlines()]
    assert line["skipped_updates"] == 2.0
    weights = [path.read_bytes() for path in sorted((job / "run").glob("checkpoints/step-*/model.safetensors"))]
    assert weights[0] != weights[1] == weights[2] != weights[3]


def test_weights_that_are_no_numbers_are_not_saved(job, capsys, monkeypatch):
    from opsd.teacher import ShadowTeacher

    def ruin(self, skipped):
        next(iter(self.parameters.values())).data[0, 0] = float("nan")

    monkeypatch.setattr(ShadowTeacher, "update", ruin)
    err = run(job, "checkpoint.every=1", capsys=capsys)
    assert "expected weights that are finite numbers; found others in model.embed_tokens.weight" in err
    assert not list((job / "run" / "checkpoints").glob("*")) and not list((job / "run" / "checkpoints").glob(".*"))
