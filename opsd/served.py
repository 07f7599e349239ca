"""Rollouts on a vLLM server, for a run whose own machine has outgrown its decoding. Token ids in, token ids out.

    VLLM_ALLOW_RUNTIME_LORA_UPDATING=1 vllm serve MODEL --enable-lora --max-lora-rank 16    # prefix caching is on
    python -m opsd.train cfg.yaml model.adapter=lora rollout.server=http://host:8000/v1

What changes from step to step is the adapter, and it is all that is sent: written to a folder that both machines see,
loaded under a name of its own before the step's responses are drawn, unloaded when the next one is there. A server
samples with other kernels and random numbers than ours, and leaves out by min_p before top_k and top_p instead of after
them, so its responses are not those of `opsd.rollout`, and a resumed run need not repeat them. Everything after the
rollout is the same code.
"""

from __future__ import annotations

import glob
import json
import math
import secrets
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import torch

from opsd.chat import ChatClient, Endpoint, RefusedError
from opsd.data import Example
from opsd.engine import response_hidden
from opsd.errors import InputError, raise_all, writing
from opsd.logits import logits_of
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.responses import Responses
from opsd.sampling import Sampling
from opsd.say import say_once
from opsd.transfer import to_device
from opsd.world import World

_AT_ONCE: Final = 64  # requests under way; the server batches them
_SILENCE: Final = 3600.0  # seconds: nothing comes before the last token of a request's answers
_STRANGER: Final = 0.5  # nats; other kernels and roundings of the same weights give hundredths
_FIELD: Final = "rollout.server"
_ANSWERS: Final = "a vLLM server that answers"
_TAKES: Final = "one that takes this adapter (VLLM_ALLOW_RUNTIME_LORA_UPDATING=1, --enable-lora, --max-lora-rank)"
# what is not said here, a server takes from the model's generation_config.json
_NO_PENALTIES: Final = {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}


@dataclass(frozen=True)
class _Answer:
    tokens: list[int]
    logprobs: list[float]


class ServedRollouts:
    """Called as `opsd.rollout.Rollouts` is.

    url: of the server's API, with its version. folder: for adapters. name: of this run's adapters, no other run's.
    world: its first process sends them.
    """

    def __init__(self, model: LanguageModel, url: str, folder: Path, name: str, world: World):
        self.model, self.folder, self.world = model, folder, world
        self.client = ChatClient(Endpoint(url, "", timeout=_SILENCE).check(_FIELD))
        self._sent, self._new = 0, not folder.exists()
        # a server takes no name twice, and may still have those of this run before it was resumed
        self._name, self._now = name, f"{name}-{world.told(secrets.token_hex(4))}"
        with world.in_turn():
            left = [one for one in self._ask("models", None, _names) if one.startswith(f"{name}-")]
            for one in left if world.main else ():
                self._ask("unload_lora_adapter", {"lora_name": one}, _anything)
            if world.main:
                self._clear()

    def check(self, prompt: Prompt, sampling: Sampling) -> None:
        """Draw a few tokens before the run begins.

        Raises InputError for what the server refuses of the adapter or the sampling, and where its log-probabilities
        tell that its model is another one. Its folder then is as it was.
        """
        try:
            few = replace(
                sampling, group_size=min(4, sampling.group_size), max_new_tokens=min(32, sampling.max_new_tokens)
            )
            gap = self._gap(prompt, few)
            if not gap <= _STRANGER:
                expected = "a server of the model that is trained (model.path), with --logprobs-mode raw_logprobs"
                raise InputError(expected, f"log-probabilities {gap:.2g} from ours on average", field=_FIELD)
        except BaseException:  # nobody waits an hour for a server
            if self.world.main:
                self._clear()
            raise
        say_once(f"rollouts by {self.client.endpoint.url}: log-probabilities {gap:.1g} from ours on average")

    def _gap(self, prompt: Prompt, sampling: Sampling) -> float:
        """Mean |log-probability there - here| of tokens that the server draws, the largest of all processes; infinite
        where we do not even have one of them."""
        model, gap = self.model, math.inf
        theirs = self([prompt], sampling, [0])
        if self.world.largest(int(theirs.tokens.max())) < len(model.head.weight):  # of all: the pass is one of all
            with torch.no_grad(), model.mode(train=False), model.gathered():
                hidden = response_hidden(model, [prompt], theirs, share_prefix=False)
                logprobs = logits_of(hidden, model.head).log_softmax(-1)
            ours = logprobs.gather(1, theirs.packed_tokens[:, None])[:, 0]
            gap = (ours - theirs.packed_logprobs).abs().mean().item()
        model.tokens.take()  # these are no step's
        return self.world.largest(gap)

    def _clear(self) -> None:
        """Remove this run's adapters, and their folder if it came with them."""
        for path in self.folder.glob(f"{glob.escape(self._name)}-*"):
            shutil.rmtree(path, ignore_errors=True)
        with suppress(OSError):
            if self._new:
                self.folder.rmdir()

    def __call__(self, prompts: Sequence[Prompt], sampling: Sampling, seeds: Sequence[int]) -> Responses:
        """G responses for each of B prompts, with log-probabilities as the server gives them."""
        name = self._send_adapter()

        def answers(prompt: Prompt, seed: int) -> list[_Answer]:
            ids = prompt.inputs["input_ids"][0].tolist()
            body = {**_settings(sampling, self.model), "model": name, "prompt": ids, "seed": seed}
            return self._ask("completions", body, lambda raw: _read(raw, ids, sampling))

        with ThreadPoolExecutor(_AT_ONCE) as pool:
            every = [answer for of_one in pool.map(answers, prompts, seeds) for answer in of_one]
        responses = Responses.pack(
            [one.tokens for one in every], sampling.group_size, self.model.pad_id, self.model.device
        )
        logprobs = torch.zeros(responses.tokens.shape)
        for row, one in zip(logprobs, every, strict=True):
            row[: len(one.logprobs)] = torch.tensor(one.logprobs)
        return Responses(responses.tokens, responses.lengths, responses.owners, to_device(logprobs, self.model.device))

    def _send_adapter(self) -> str:
        """The name under which the server now has the student's adapter. The one before it is given up."""
        self._sent += 1
        name, before = (f"{self._now}-{number}" for number in (self._sent, self._sent - 1))
        with self.world.in_turn():
            if self.world.main:
                path = self.folder / name
                with writing(path):
                    self.model.module.save_pretrained(path, save_embedding_layers=False)
                self._ask("load_lora_adapter", {"lora_name": name, "lora_path": str(path)}, _anything, _TAKES)
                if self._sent > 1:
                    self._ask("unload_lora_adapter", {"lora_name": before}, _anything)
                    shutil.rmtree(self.folder / before, ignore_errors=True)
        return name

    def _ask(self, path: str, body: dict[str, Any] | None, read: Any, expected: str = _ANSWERS) -> Any:
        try:
            return self.client.post(path, body, read)
        except RefusedError as error:
            where = f"{self.client.endpoint.url.rstrip('/')}/{path}"
            expected = _ANSWERS if error.status is None else expected
            raise InputError(expected, f"{where}: {error.reason}", field=_FIELD) from error


def check_text_only(rows: Sequence[Example]) -> None:
    """Raise InputError for a row with media: a server would cut them up by itself, and not as our passes do."""
    raise_all([
        row.problem(field, f"text, all that the student may be shown with {_FIELD}", f"a part with {kind}")
        for row in rows
        for field, kind, _ in row.media()
        if field.startswith("prompt")  # what only the teacher sees never gets there
    ])  # fmt: skip


def _settings(sampling: Sampling, model: LanguageModel) -> dict[str, Any]:
    """The body of a request that draws as `sampling` says, from what our rollouts may draw."""
    return {
        "n": sampling.group_size,
        "max_tokens": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1 if sampling.top_k is None else sampling.top_k,
        "min_p": sampling.min_p,
        **_NO_PENALTIES,
        "stop": list(sampling.stop),
        "include_stop_str_in_output": True,
        "stop_token_ids": model.end_ids,
        "ignore_eos": True,  # no others end
        "logit_bias": {str(token): -100.0 for token in model.suppressed_ids},
        "skip_special_tokens": False,
        "logprobs": 0,  # of the drawn tokens alone
        "return_token_ids": True,
    }


def _read(raw: bytes, prompt: list[int], sampling: Sampling) -> list[_Answer]:
    """The answers of one request. Raises InputError where token ids did not come through as they were sent."""
    choices = json.loads(raw)["choices"]
    found = []
    for choice in sorted(choices, key=lambda choice: int(choice["index"])):
        tokens, logprobs = choice.get("token_ids"), choice["logprobs"]["token_logprobs"]
        if tokens is None:
            raise InputError("a server that returns token ids (vLLM 0.10.2 or newer)", "none", field=_FIELD)
        if choice.get("prompt_token_ids") not in (None, prompt):
            raise InputError("the prompt's token ids as they were sent", "others", field=_FIELD)
        if choice["finish_reason"] not in ("stop", "length"):
            raise ValueError("an answer that was given up")  # "abort": the server is going down
        if choice["finish_reason"] == "length" and len(tokens) < sampling.max_new_tokens:
            room = f"room for {len(prompt)} + {sampling.max_new_tokens} tokens (vLLM's --max-model-len)"
            raise InputError(room, f"an answer that was ended after {len(tokens)}", field=_FIELD)
        if not 0 < len(tokens) <= sampling.max_new_tokens or len(logprobs) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens with {len(logprobs)} log-probabilities")
        found.append(_Answer([int(token) for token in tokens], [float(value) for value in logprobs]))
    if len(found) != sampling.group_size:
        raise ValueError(f"{len(found)} answers")
    return found


def _names(raw: bytes) -> list[str]:
    return [str(one["id"]) for one in json.loads(raw)["data"]]


def _anything(raw: bytes) -> None:
    """The endpoints of adapters answer with a sentence."""
