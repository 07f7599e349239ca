"""Rollouts on a server: a mimic of vLLM's API that draws with our own rollouts must give the same run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from opsd.config import ModelConfig
from opsd.errors import InputError
from opsd.loading import load_model
from opsd.opening import open_run
from opsd.prompts import Prompt
from opsd.rollout import rollout
from opsd.sampling import Sampling
from opsd.train import train
from tests.endpoints import serving
from tests.jobs import text_job
from tests.test_resume import metrics, weights

LORA = ("model.adapter=lora", "teacher.lora_average=factors")


class Mimic:
    """What a vLLM server does with these requests: adapters by name, token ids in and out."""

    def __init__(self, base: Path):
        self.base, self.adapters, self.unloaded = base, {}, []
        self.spoil = lambda choice: None

    def __call__(self, body: dict[str, Any]) -> Any:
        if "lora_path" in body:
            assert body["lora_name"] not in self.adapters, "a server takes no name twice"
            config = ModelConfig(path=str(self.base), adapter="lora")
            self.adapters[body["lora_name"]] = load_model(config, checkpoint=Path(body["lora_path"]))
            return b"Success: LoRA adapter added successfully."
        if "lora_name" in body:
            del self.adapters[body["lora_name"]]
            self.unloaded.append(body["lora_name"])
            return b"Success: LoRA adapter removed successfully."
        return (
            self.complete(body) if "prompt" in body else {"data": [{"id": name} for name in ("base", *self.adapters)]}
        )

    def complete(self, body: dict[str, Any]) -> Any:
        model = self.adapters[body["model"]]
        assert {int(token) for token in body["logit_bias"]} == set(model.suppressed_ids)
        assert body["stop_token_ids"] == model.end_ids
        assert body["include_stop_str_in_output"] and not body["skip_special_tokens"]
        ids = torch.tensor([body["prompt"]])
        prompt = Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "")
        top_k = None if body["top_k"] == -1 else body["top_k"]
        settings = (body["temperature"], body["top_p"], top_k, body["min_p"], tuple(body["stop"]))
        drawn = rollout(model, [prompt], Sampling(body["n"], body["max_tokens"], *settings), [body["seed"]])
        choices = [
            {
                "index": i,
                "token_ids": tokens[:n],
                "logprobs": {"token_logprobs": logprobs[:n]},
                "prompt_token_ids": None,
            }
            for i, (tokens, logprobs, n) in enumerate(
                zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.lengths, strict=True)
            )
        ]
        for choice in choices:
            self.spoil(choice)
        return {"choices": choices[::-1]}  # in whatever order they end


@pytest.fixture
def server(tmp_path):
    text_job(tmp_path)
    with serving() as endpoint:
        endpoint.mimic = endpoint.reply = Mimic(tmp_path / "model")
        yield endpoint


@pytest.mark.parametrize("more", [(), ("objective.kind=reward", "rollout.stop=[voice]", "rollout.top_k=9")])
def test_a_run_with_a_server_is_the_run_without(tmp_path, server, more):
    own = text_job(tmp_path, *LORA, *more, f"train.run_dir={tmp_path / 'own'}")
    served = text_job(tmp_path, *LORA, *more, f"rollout.server={server.url}")
    train(own)
    train(served)
    ours, theirs = (metrics(config.train.run_dir) for config in (own, served))
    for one, other in zip(ours, theirs, strict=True):
        different = {name for name in one if one[name] != pytest.approx(other[name], rel=1e-6)}
        assert different <= {"padded_tokens"}
    for name, tensor in weights(own.train.run_dir).items():
        torch.testing.assert_close(weights(served.train.run_dir)[name], tensor)


def test_answers_lie_in_their_order_with_their_logprobs(tmp_path, server):
    sampling, seeds = Sampling(4, 8), [5, 6, 7]
    with open_run(text_job(tmp_path, *LORA, f"rollout.server={server.url}")) as run:
        prompts = [run.prompts.student(row) for row in run.train[:3]]
        found = run.rollouts(prompts, sampling, seeds)
    want = rollout(run.model, prompts, sampling, seeds)
    assert (found.lengths, found.owners) == (want.lengths, want.owners) and len(set(want.lengths)) > 1
    assert torch.equal(found.tokens, want.tokens)
    torch.testing.assert_close(found.logprobs, want.logprobs, rtol=1e-5, atol=1e-5)


def test_every_step_samples_from_the_adapter_of_that_step_and_gives_up_the_last(tmp_path, server):
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    train(config)
    sent = [body["lora_name"] for path, _, body in server.seen if path.endswith("/load_lora_adapter")]
    assert len(set(sent)) == 4
    assert all(name.startswith("opsd-run-") for name in sent)
    assert server.mimic.unloaded == sent[:-1]
    asked = [body["model"] for path, _, body in server.seen if path.endswith("/completions")]
    assert asked == [name for name in sent for _ in range(config.train.prompts_per_step)]
    assert [p.name for p in (config.train.run_dir / "served").iterdir()] == sent[-1:]


def test_a_resumed_run_takes_new_names_and_gives_up_the_old_one(tmp_path, server):
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}", "train.steps=2")
    train(config)
    [left] = server.mimic.adapters
    server.mimic.adapters["opsd-run-of-somebody-else"] = None
    train(text_job(tmp_path, *LORA, f"rollout.server={server.url}", "train.steps=4"), resume=True)
    assert left in server.mimic.unloaded
    assert len(server.mimic.adapters) == 2
    assert "opsd-run-of-somebody-else" in server.mimic.adapters


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda choice: choice.update(token_ids=None), "token ids"),
        (lambda choice: choice.update(prompt_token_ids=[1, 2]), "as they were sent"),
    ],
)
def test_a_server_that_speaks_text_is_refused(tmp_path, server, spoil, says):
    server.mimic.spoil = spoil
    with pytest.raises(InputError, match=says):
        train(text_job(tmp_path, *LORA, f"rollout.server={server.url}"))


def test_a_server_that_is_not_there_is_told_before_the_first_step(tmp_path, server):
    server.script = [(404, {}, b"no such page")]
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    with pytest.raises(InputError, match=r"rollout\.server.*HTTP 404"), open_run(config):
        pass
    assert not config.train.run_dir.exists()


def test_full_weights_and_rows_with_media_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"unless model\.adapter is lora"):
        text_job(tmp_path, "rollout.server=http://localhost:1/v1")
    config = text_job(tmp_path, *LORA, "rollout.server=http://localhost:1/v1")
    rows = config.data.train
    first, *rest = [json.loads(line) for line in rows.read_text().splitlines()]
    (tmp_path / "face.png").write_bytes(b"")
    first["prompt"] = [{"role": "user", "content": [{"type": "image", "image": "face.png"}]}]
    rows.write_text("".join(json.dumps(row) + "\n" for row in (first, *rest)))
    with (
        pytest.raises(InputError, match=r":1: field 'prompt\[0\].content\[0\].image': expected text"),
        open_run(config),
    ):
        pass
