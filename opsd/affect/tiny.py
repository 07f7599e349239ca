"""A Qwen2.5-Omni thinker small enough for a laptop: the real class and processor parts, built from a config.

The folder `build` writes loads with plain transformers, like a hub checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast, Qwen2_5OmniThinkerForConditionalGeneration

PAD, UNKNOWN, START, END = "<|endoftext|>", "<|unk|>", "<|im_start|>", "<|im_end|>"
# attribute of the tokenizer that Qwen2_5OmniProcessor reads -> token
MEDIA_TOKENS: Final = {
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
}
TAGS: Final = ("<think>", "</think>", "<answer>", "</answer>")  # ordinary tokens: the model writes them
ROLES: Final = ("system", "user", "assistant")

CHAT_TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_bos|><|IMAGE|><|vision_eos|>"
    "{% elif part['type'] == 'audio' %}<|audio_bos|><|AUDIO|><|audio_eos|>"
    "{% elif part['type'] == 'video' %}<|vision_bos|><|VIDEO|><|vision_eos|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TinySize:
    """Widths and depths. An image, or two frames, are (image/patch/2)^2 tokens, a second of sound 4000/hop tokens."""

    width: int = 128
    inner: int = 256
    layers: int = 2
    heads: int = 4
    vision_width: int = 64
    vision_layers: int = 1
    audio_width: int = 64
    audio_layers: int = 1
    image: int = 48  # pixels a side after resizing
    patch: int = 8
    mel_bins: int = 64
    n_fft: int = 1024
    hop: int = 400  # samples between two frames


def build_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A lower-case word tokenizer whose vocabulary is the words of `texts`, in sorted order."""
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    lower = normalizers.Lowercase()
    splitter = pre_tokenizers.Split(Regex(r"\s+|(?=[^\s\w])|(?<=[^\s\w])"), "removed")
    words: set[str] = set(ROLES)
    for text in texts:
        words.update(word for word, _ in splitter.pre_tokenize_str(lower.normalize_str(text)))
    words -= {"<", ">", "/"}
    vocabulary = [PAD, UNKNOWN, START, END, *MEDIA_TOKENS.values(), *TAGS, *sorted(words)]
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=UNKNOWN))
    core.normalizer = lower
    core.pre_tokenizer = splitter
    core.add_tokens(list(TAGS))
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        unk_token=UNKNOWN,
        eos_token=END,
        extra_special_tokens={**MEDIA_TOKENS, "turn_bos_token": START},
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
    )


def build_model(
    tokenizer: PreTrainedTokenizerFast, size: TinySize, seed: int
) -> Qwen2_5OmniThinkerForConditionalGeneration:
    """Random weights in the real class, float32."""
    import torch
    from transformers import Qwen2_5OmniThinkerConfig, Qwen2_5OmniThinkerForConditionalGeneration

    token = tokenizer.convert_tokens_to_ids
    half = size.width // size.heads // 2  # rotary frequencies: a quarter for time, the rest for height and width
    side = (half - half // 4) // 2
    config = Qwen2_5OmniThinkerConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": size.width,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.heads,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [half - 2 * side, side, side],
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": size.vision_layers,
            "hidden_size": size.vision_width,
            "intermediate_size": 2 * size.vision_width,
            "num_heads": 4,
            "patch_size": size.patch,
            "window_size": size.image,
            "out_hidden_size": size.width,
            "fullatt_block_indexes": list(range(size.vision_layers)),
        },
        audio_config={
            "num_mel_bins": size.mel_bins,
            "encoder_layers": size.audio_layers,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 2 * size.audio_width,
            "d_model": size.audio_width,
            "n_window": 50,  # frames a chunk, halved: a clip is one chunk
            "max_source_positions": 100,
            "output_dim": size.width,
        },
        audio_token_index=token(MEDIA_TOKENS["audio_token"]),
        image_token_index=token(MEDIA_TOKENS["image_token"]),
        video_token_index=token(MEDIA_TOKENS["video_token"]),
        audio_start_token_id=token(MEDIA_TOKENS["audio_bos_token"]),
        audio_end_token_id=token(MEDIA_TOKENS["audio_eos_token"]),
        vision_start_token_id=token(MEDIA_TOKENS["vision_bos_token"]),
        vision_end_token_id=token(MEDIA_TOKENS["vision_eos_token"]),
        user_token_id=token("user"),
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        tie_word_embeddings=False,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen2_5OmniThinkerForConditionalGeneration(config).float().eval()
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model


def preprocessor_config(size: TinySize) -> dict[str, Any]:
    """One flat file for image processor and feature extractor, as on the hub."""
    pixels = size.image**2
    return {
        "image_processor_type": "Qwen2VLImageProcessor",
        "feature_extractor_type": "WhisperFeatureExtractor",
        "processor_class": "Qwen2_5OmniProcessor",
        "patch_size": size.patch,
        "merge_size": 2,
        "temporal_patch_size": 2,
        "size": {"shortest_edge": pixels, "longest_edge": pixels},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
        "feature_size": size.mel_bins,
        "hop_length": size.hop,
        "n_fft": size.n_fft,
        "chunk_length": 1,
        "sampling_rate": 16_000,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": True,
    }


def build(folder: Path, texts: Iterable[str], size: TinySize, seed: int) -> None:
    """Write model, tokenizer and processor files to `folder`."""
    from transformers.utils import logging

    logging.disable_progress_bar()  # a megabyte is written before a bar is drawn
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(texts)
    tokenizer.save_pretrained(folder)
    build_model(tokenizer, size, seed).save_pretrained(folder)
    settings = preprocessor_config(size)
    (folder / "preprocessor_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    shared = ("patch_size", "merge_size", "temporal_patch_size", "size", "image_mean", "image_std")
    video = {name: settings[name] for name in shared}
    video["video_processor_type"] = "Qwen2VLVideoProcessor"
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")
