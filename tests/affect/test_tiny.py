"""The tiny thinker: a folder plain transformers opens, the words of the job in its vocabulary, a processor for it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from opsd.affect.clips import TEST, write_split
from opsd.affect.embedded import vocabulary
from opsd.affect.tiny import MEDIA_TOKENS, START, TAGS, TinySize, build, build_model
from opsd.config import load_config
from opsd.data import Example, read_examples
from opsd.media import load_audio, load_video
from opsd.processing import load_processor
from opsd.prompts import PromptBuilder

SMALL = ("media.frames=4", "media.min_pixels=1024", "media.max_pixels=1024")
SIZE = TinySize(width=32, inner=64, layers=2, heads=2, vision_width=32, audio_width=32)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    build(made, vocabulary(), SIZE, seed=0)
    return made


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory) -> list[Example]:
    rows = write_split(tmp_path_factory.mktemp("rows"), TEST, seed=0, size=24)
    return read_examples(rows, load_config(None, ["model.path=x"]).data)


def test_plain_transformers_reloads_the_same_logits(folder: Path, examples: list[Example]) -> None:
    from transformers import (
        AutoTokenizer,
        Qwen2_5OmniThinkerForConditionalGeneration,
        Qwen2VLImageProcessorPil,
        WhisperFeatureExtractor,
    )

    config = load_config(None, [f"model.path={folder}", *SMALL])
    builder = PromptBuilder(load_processor(folder), config.prompts, config.media)
    ours = builder.student(examples[0]).inputs
    film, sound = (path for _, _, path in examples[0].media())
    size = {"shortest_edge": 1024, "longest_edge": 1024}
    stills = list(load_video(film, 4).frames)
    pixels = Qwen2VLImageProcessorPil.from_pretrained(folder)(stills, size=size, return_tensors="pt")["pixel_values"]
    mel = WhisperFeatureExtractor.from_pretrained(folder)(
        load_audio(sound, 16_000), sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    pairs = pixels.view(2, 2, 16, 3, 2, 64)[..., 0, :].permute(0, 2, 3, 1, 4)  # two frames side by side in each patch
    one_level = 1 / 255 / 0.25  # Pillow and torch round the same filter differently
    found = ours["pixel_values_videos"].view(2, 16, 3, 2, 64)
    torch.testing.assert_close(found, pairs, rtol=0, atol=2.01 * one_level)
    length = int(mel["attention_mask"].sum())
    assert int(ours["feature_attention_mask"].sum()) == length
    torch.testing.assert_close(mel["input_features"][..., :length], ours["input_features"][..., :length])

    tokenizer = AutoTokenizer.from_pretrained(folder)
    reloaded = Qwen2_5OmniThinkerForConditionalGeneration.from_pretrained(folder).eval()
    fresh = build_model(tokenizer, SIZE, seed=0)
    with torch.no_grad():
        assert torch.equal(reloaded(**ours).logits, fresh(**ours).logits)
    assert reloaded.generation_config.eos_token_id == tokenizer.eos_token_id


def test_the_default_size_is_small(folder: Path) -> None:
    from transformers import AutoTokenizer

    model = build_model(AutoTokenizer.from_pretrained(folder), TinySize(), seed=0)
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


def test_special_tokens_are_special_and_tags_are_words(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    assert {*MEDIA_TOKENS.values(), START, "<|im_end|>", "<|unk|>", "<|endoftext|>"} <= special
    assert not special & set(TAGS)
    assert all(len(tokenizer(tag)["input_ids"]) == 1 for tag in TAGS)
    assert all(getattr(tokenizer, name) == token for name, token in MEDIA_TOKENS.items())


def test_no_word_of_the_job_is_unknown(folder: Path, examples: list[Example]) -> None:
    processor = load_processor(folder)
    tokenizer = processor.tokenizer
    for privilege in ("rationale", "label"):
        config = load_config(None, [f"model.path={folder}", f"prompts.privilege={privilege}", *SMALL])
        builder = PromptBuilder(processor, config.prompts, config.media)
        for example in examples:
            assert tokenizer.unk_token_id not in builder.teacher(example).inputs["input_ids"]
    for example in examples:
        ids = tokenizer(example.answer, add_special_tokens=False)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == example.answer


def test_a_medium_is_as_many_tokens_as_its_size_says(folder: Path) -> None:
    processor = load_processor(folder)
    sound = np.zeros(12_800, np.float32)
    image = np.zeros((64, 64, 3), np.uint8)
    text = "<|vision_bos|><|IMAGE|><|vision_eos|><|audio_bos|><|AUDIO|><|audio_eos|>"
    out = processor(text=[text], images=[image], audio=[sound], sampling_rate=16_000, return_tensors="pt")
    ids = out["input_ids"][0].tolist()
    token = processor.tokenizer.convert_tokens_to_ids
    assert ids.count(token("<|IMAGE|>")) == (48 // 8 // 2) ** 2
    assert ids.count(token("<|AUDIO|>")) == 32 // 4  # 0.8 s of 25 ms frames, four a token


def test_folder_has_what_the_full_processor_reads(folder: Path) -> None:
    video = json.loads((folder / "video_preprocessor_config.json").read_text())
    assert video["video_processor_type"] == "Qwen2VLVideoProcessor"
