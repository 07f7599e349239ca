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
from opsd.stopping import StopStrings
from opsd.train import train
from tests.endpoints import serving
from tests.jobs import text_job
from tests.models import save_text_model
from tests.test_resume import metrics, weights

LORA = ("model.adapter=lora", "teacher.lora_average=factors")


class Mimic:
    """What vLLM 0.32 does with these requests: adapters by name, token ids in and out, refusals in its words.

    base: the model it serves. rank: the largest of an adapter. room: tokens of a prompt with its answer. penalty: what
    generation_config.json asks for where a request says nothing.
    """

    def __init__(self, base: Path):
        self.base, self.rank, self.room, self.penalty = base, 16, 256, 1.3
        self.adapters, self.unloaded = {}, []
        self.spoil = lambda choice: None

    def __call__(self, body: dict[str, Any]) -> Any:
        if "lora_path" in body:
            return self.load(body["lora_name"], Path(body["lora_path"]))
        if "lora_name" in body:
            return self.unload(body["lora_name"])
        if "prompt" in body:
            return self.complete(body)
        return {"data": [{"id": str(self.base)}, *({"id": name} for name in self.adapters)]}

    def load(self, name: str, folder: Path) -> Any:
        if name in self.adapters:
            return refusal(400, f"The lora adapter '{name}' has already been loaded.")
        rank = json.loads((folder / "adapter_config.json").read_text())["r"]
        if rank > self.rank:
            return refusal(500, f"LoRA rank {rank} is greater than max_lora_rank {self.rank}.")
        self.adapters[name] = load_model(ModelConfig(path=str(self.base), adapter="lora"), checkpoint=folder)
        return f"Success: LoRA adapter '{name}' added successfully.".encode()

    def unload(self, name: str) -> Any:
        if name not in self.adapters:
            return refusal(404, f"The lora adapter '{name}' cannot be found.")
        del self.adapters[name]
        self.unloaded.append(name)
        return f"Success: LoRA adapter '{name}' removed successfully.".encode()

    def complete(self, body: dict[str, Any]) -> Any:
        if len(body["stop"]) > 4:
            return refusal(400, "List should have at most 4 items after validation")
        if body["max_tokens"] > self.room:
            return refusal(400, f"max_tokens={body['max_tokens']} cannot be greater than max_model_len={self.room}.")
        model = self.adapters[body["model"]]
        assert {int(token) for token in body["logit_bias"]} == set(model.suppressed_ids)
        assert body["stop_token_ids"] == model.end_ids and body["ignore_eos"]
        assert body["include_stop_str_in_output"] and not body["skip_special_tokens"]
        assert body.get("repetition_penalty", self.penalty) == 1.0
        assert body.get("presence_penalty", self.penalty) == body.get("frequency_penalty", self.penalty) == 0.0
        ids = torch.tensor([body["prompt"]])
        prompt = Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "")
        top_k = None if body["top_k"] == -1 else body["top_k"]
        settings = (body["temperature"], body["top_p"], top_k, body["min_p"], tuple(body["stop"]))
        most = min(body["max_tokens"], self.room - prompt.length)  # it says nothing of what did not fit
        drawn = rollout(model, [prompt], Sampling(body["n"], most, *settings), [body["seed"]])
        stops = StopStrings(model.tokenizer, tuple(body["stop"]))
        choices = []
        for row, logprobs, n in zip(drawn.tokens.tolist(), drawn.logprobs.tolist(), drawn.lengths, strict=True):
            tokens = row[:n]
            ended = tokens[-1] in model.end_ids or stops.first(tokens, 0) is not None
            choices.append({
                "index": len(choices),
                "finish_reason": "stop" if ended else "length",
                "token_ids": tokens,
                "logprobs": {"token_logprobs": logprobs[:n]},
                "prompt_token_ids": body["prompt"],
            })  # fmt: skip
            self.spoil(choices[-1])
        return {"choices": choices[::-1]}  # in whatever order they end


def refusal(status: int, message: str) -> tuple[int, dict[str, str], dict[str, Any]]:
    return status, {}, {"error": {"message": message, "code": status}}


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
        assert run.model.tokens.computed == 0  # those of the server's trial are no step's
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
    assert len(set(sent)) == 1 + 4  # one that the server is tried with
    assert all(name.startswith("opsd-run-") for name in sent)
    assert server.mimic.unloaded == sent[:-1]
    tried, *asked = [body["model"] for path, _, body in server.seen if path.endswith("/completions")]
    assert tried == sent[0]
    assert asked == [name for name in sent[1:] for _ in range(config.train.prompts_per_step)]
    assert [p.name for p in (config.train.run_dir / "served").iterdir()] == sent[-1:]


def test_a_resumed_run_takes_new_names_and_gives_up_the_old_one(tmp_path, server):
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}", "train.steps=2")
    train(config)
    [left] = server.mimic.adapters
    assert (tmp_path / "run" / "served" / left).exists()
    server.mimic.adapters["opsd-run-of-somebody-else"] = None
    train(text_job(tmp_path, *LORA, f"rollout.server={server.url}", "train.steps=4"), resume=True)
    assert left in server.mimic.unloaded
    assert left not in [path.name for path in (tmp_path / "run" / "served").iterdir()]
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


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("model.lora_r=17",), "takes this adapter.*LoRA rank 17 is greater than max_lora_rank 16"),
        (("rollout.stop=[a,sad,happy,angry,face]",), "at most 4 items"),
    ],
)
def test_what_a_server_refuses_is_told_before_the_first_step(tmp_path, server, words, says, monkeypatch):
    monkeypatch.setattr("opsd.pace.Clock.sleep", lambda self, seconds: None)
    config = text_job(tmp_path, *LORA, *words, f"rollout.server={server.url}")
    with pytest.raises(InputError, match=says), open_run(config):
        pass
    assert not config.train.run_dir.exists()


def test_a_server_of_another_model_is_refused(tmp_path, server):
    server.mimic.base = save_text_model(tmp_path / "other", seed=1)
    kept = tmp_path / "for-servers"
    kept.mkdir()
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}", f"rollout.server_folder={kept}")
    with pytest.raises(InputError, match=r"model\.path.*log-probabilities [1-9.]+ from ours"), open_run(config):
        pass
    assert not config.train.run_dir.exists()
    assert list(kept.iterdir()) == []


def test_the_trial_asks_for_no_more_answers_than_a_step(tmp_path, server):
    """Each of them is a whole sequence of the pass that compares them."""
    with open_run(text_job(tmp_path, *LORA, "rollout.group_size=1", f"rollout.server={server.url}")):
        [tried] = [body for path, _, body in server.seen if path.endswith("/completions")]
    assert tried["n"] == 1


def test_a_trial_that_is_interrupted_leaves_no_folder(tmp_path, server, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("opsd.served.response_hidden", interrupted)
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    with pytest.raises(KeyboardInterrupt), open_run(config):
        pass
    assert len(server.mimic.adapters) == 1
    assert not config.train.run_dir.exists()


def test_a_server_of_a_larger_vocabulary_is_refused(tmp_path, server):
    server.mimic.spoil = lambda choice: choice.update(token_ids=[400] * len(choice["token_ids"]))
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    with pytest.raises(InputError, match=r"model\.path.*log-probabilities inf from ours"), open_run(config):
        pass


def test_an_answer_that_the_server_cut_short_is_refused(tmp_path, server):
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    with open_run(config) as run:
        prompts = [run.prompts.student(row) for row in run.train[:3]]
        server.mimic.room = max(prompt.length for prompt in prompts) + 5
        with pytest.raises(InputError, match=r"\+ 8 tokens \(vLLM's --max-model-len\).*ended after [5-7]"):
            run.rollouts(prompts, Sampling(16, 8), [5, 6, 7])


def test_answers_of_a_server_that_goes_down_are_asked_for_again(tmp_path, server, monkeypatch):
    monkeypatch.setattr("opsd.pace.Clock.sleep", lambda self, seconds: None)
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    with open_run(config) as run:
        prompts = [run.prompts.student(run.train[0])]
        want = run.rollouts(prompts, Sampling(3, 8), [5])
        reasons = iter(["abort"])

        def abort_one(choice):
            for choice["finish_reason"] in reasons:
                choice["token_ids"], choice["logprobs"] = choice["token_ids"][:1], {"token_logprobs": [-1.0]}

        server.mimic.spoil = abort_one
        found = run.rollouts(prompts, Sampling(3, 8), [5])
    assert next(reasons, None) is None
    assert torch.equal(found.tokens, want.tokens)


def test_a_server_that_has_gone_is_told_as_such(tmp_path, server, monkeypatch):
    monkeypatch.setattr("opsd.pace.Clock.sleep", lambda self, seconds: None)
    config = text_job(tmp_path, *LORA, f"rollout.server={server.url}")
    with open_run(config) as run:
        server.reply = lambda body: 1 / 0  # the connection breaks
        with pytest.raises(InputError, match=r"server that answers.*load_lora_adapter: no reply"):
            run.rollouts([run.prompts.student(run.train[0])], Sampling(3, 8), [5])


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
