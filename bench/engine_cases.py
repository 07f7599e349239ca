"""What the engine is timed on: a Llama of SmolLM2-135M's widths with random weights, prompts of given lengths.

Letters: P prompt, R rationale, T response tokens, G responses per prompt, B prompts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from opsd.config import EngineConfig, ModelConfig
from opsd.families import install
from opsd.model import LanguageModel
from opsd.prompts import Prompt
from opsd.responses import Responses

PAD, END, FIRST = "<pad>", "<end>", 2  # the two special ids come first, then words w2, w3, ...


@dataclass(frozen=True)
class Size:
    """Widths of a Llama; DEPTHS of it are timed, because every layer costs the same."""

    layers: int
    width: int
    heads: int
    kv_heads: int
    inner: int
    vocab: int


SMOLLM2 = Size(30, 576, 9, 3, 1536, 49152)  # SmolLM2-135M
TINY = Size(2, 64, 4, 2, 128, 512)


@dataclass(frozen=True)
class Shape:
    """One prompt group: P / R / T / G."""

    prompt: int
    rationale: int
    response: int
    group: int

    def __str__(self) -> str:
        return f"{self.prompt}/{self.rationale}/{self.response}/{self.group}"

    @property
    def tokens(self) -> int:
        return self.response * self.group


def tokenizer(vocab: int) -> Any:
    """One word per id, so that a text of n words is n tokens; the chat template adds none."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {PAD: 0, END: 1} | {f"w{i}": i for i in range(FIRST, vocab)}
    backend = Tokenizer(models.WordLevel(words, unk_token=PAD))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token=PAD, eos_token=END, unk_token=PAD)
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


def llama(size: Size, layers: int | None = None) -> Any:
    """Random weights, wide enough that logits differ by several nats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.width,
        intermediate_size=size.inner,
        num_hidden_layers=layers or size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        max_position_embeddings=8192,
        rope_theta=100000.0,
        tie_word_embeddings=True,
        initializer_range=0.08,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


def language_model(size: Size, layers: int | None = None, device: str = "cpu") -> LanguageModel:
    """The model as the trainer holds it; its end token is never drawn, so that responses have the lengths asked for."""
    module = llama(size, layers).to(device)
    install(module)
    config = ModelConfig(path="bench", device=device)
    model = LanguageModel(module, tokenizer(size.vocab), {}, config, EngineConfig())
    model.end_ids = [size.vocab]
    return model


def words(count: int, seed: int, vocab: int) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(FIRST, vocab, (count,), generator=generator).tolist()


def text(ids: list[int]) -> str:
    return " ".join(f"w{i}" for i in ids)


def prompt(length: int, seed: int, vocab: int) -> Prompt:
    ids = torch.tensor([words(length, seed, vocab)])
    return Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "")


def responses(lengths: list[int], per_prompt: int, vocab: int, device: torch.device) -> Responses:
    tokens = [words(n, 1000 + i, vocab) for i, n in enumerate(lengths)]
    return Responses.pack(tokens, per_prompt, 0, device)
