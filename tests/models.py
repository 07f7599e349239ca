"""Tiny models of the real classes, built on the spot for tests."""

from __future__ import annotations

from pathlib import Path

import torch

WORDS = [
    *("a", "sad", "happy", "angry", "face", "voice", "low", "high", "is", "the", "clip", "shows"),
    *("<think>", "</think>", "<answer>", "</answer>", ":", ".", ",", "user", "assistant"),
]
SPECIAL = ["<pad>", "<unk>", "<end>", "<img>"]
TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }} : {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant : {% endif %}"
)


def save_text_model(folder: Path, seed: int = 0, tied: bool = True, **changes: object) -> Path:
    """A 2-layer Llama with a word-level tokenizer; its folder loads with from_pretrained."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        unk_token="<unk>",
        eos_token="<end>",
        additional_special_tokens=["<img>"],
    )
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(seed)
    defaults = {
        "vocab_size": len(vocabulary) + 3,  # a padded vocabulary, as large models have
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "eos_token_id": 2,
        "bos_token_id": None,
        "tie_word_embeddings": tied,
        "initializer_range": 0.3,  # logits that differ: a flat model would hide mistakes
    }
    config = LlamaConfig(**{**defaults, **changes})
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
