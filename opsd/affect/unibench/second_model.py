"""Labels by a second model with the official prompts: a local causal language model, or an OpenAI-compatible endpoint.

The official script samples from Qwen2.5-7B-Instruct with temperature 0.7, top-p 0.8, repetition penalty 1.05 and 512
tokens. An endpoint is sent all but the penalty, which is not part of its interface.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from opsd.affect.unibench.prompts import ExtractionPrompts, clean_reply
from opsd.chat import ChatClient, Endpoint, RefusedError
from opsd.errors import InputError, explained

TEMPERATURE: Final = 0.7
TOP_P: Final = 0.8
REPETITION_PENALTY: Final = 1.05
MAX_TOKENS: Final = 512
BATCH: Final = 8

Ask = Callable[[list[str]], list[str]]  # prompts -> replies


class SecondModel:
    """An extractor that asks a model, in batches."""

    def __init__(self, name: str, prompts: ExtractionPrompts, ask: Ask) -> None:
        self.name, self.prompts, self._ask = name, prompts, ask

    def openset(self, responses: Mapping[str, str]) -> dict[str, str]:
        return self._all(responses, self.prompts.openset.fill)

    def sentiment(self, openset: Mapping[str, Any]) -> dict[str, str]:
        return self._all({name: str(labels) for name, labels in openset.items()}, self.prompts.sentiment.fill)

    def _all(self, texts: Mapping[str, str], fill: Callable[[str], str]) -> dict[str, str]:
        names, replies = list(texts), []
        for first in range(0, len(names), BATCH):
            replies += self._ask([fill(texts[name]) for name in names[first : first + BATCH]])
        return {name: clean_reply(reply) for name, reply in zip(names, replies, strict=True)}


def endpoint(url: str, model: str, key: str | None, seed: int) -> Ask:
    """A model behind URL/chat/completions. A refusal is an `InputError`; a passing failure is tried five times."""
    client = ChatClient(Endpoint(url, model, key).check("--extractor"))

    def one(prompt: str) -> str:
        message = {"role": "user", "content": prompt}
        settings = {"temperature": TEMPERATURE, "top_p": TOP_P, "max_tokens": MAX_TOKENS, "seed": seed}
        try:
            return client.ask([message], settings).text
        except RefusedError as error:
            raise InputError("a reply", error.reason, field="--extractor") from error

    def ask(prompts: list[str]) -> list[str]:
        with ThreadPoolExecutor(BATCH) as pool:
            return list(pool.map(one, prompts))

    return ask


def local(folder: Path, seed: int) -> Ask:
    """A model in a folder of transformers, sampled as the official script samples."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with explained("a folder with a causal language model", field="--extractor"):
        tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    generator = torch.Generator(device="cpu").manual_seed(seed)

    def ask(prompts: list[str]) -> list[str]:
        texts = [
            tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
            )
            for prompt in prompts
        ]
        inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False).to(device)
        with torch.no_grad(), torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
            out = model.generate(
                **inputs,
                do_sample=True,
                temperature=TEMPERATURE,
                top_p=TOP_P,
                repetition_penalty=REPETITION_PENALTY,
                max_new_tokens=MAX_TOKENS,
            )
        return list(tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))

    return ask
