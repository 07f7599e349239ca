"""The real processors of the multimodal families, over a vocabulary of characters that fits the tiny models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.families import A_END, A_START, AUDIO, END, FAMILIES, IMAGE, MEL, V_END, V_START, VIDEO, VOCABULARY

WITH_VIDEO = {name: family for name, family in FAMILIES.items() if "video" in family.media}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz0123456789.,:"
SPECIAL = {
    "vl": {
        IMAGE: "<|image_pad|>",
        VIDEO: "<|video_pad|>",
        V_START: "<|vision_start|>",
        V_END: "<|vision_end|>",
    },
    "omni": {
        IMAGE: "<|IMAGE|>",
        VIDEO: "<|VIDEO|>",
        AUDIO: "<|AUDIO|>",
        V_START: "<|vision_bos|>",
        V_END: "<|vision_eos|>",
        A_START: "<|audio_bos|>",
        A_END: "<|audio_eos|>",
    },
}
NAMES = {IMAGE: "image", VIDEO: "video", AUDIO: "audio", V_START: "vision_bos", V_END: "vision_eos"}
NAMES |= {A_START: "audio_bos", A_END: "audio_eos"}
MODEL_TYPES = {"qwen2_5_omni": "qwen2_5_omni_thinker", "qwen3_omni_moe": "qwen3_omni_moe_thinker"}


def template(special: dict[int, str]) -> str:
    """As the families': a medium between its marks."""

    def medium(kind: str, start: int, token: int, end: int) -> str:
        written = special.get(start, "") + special.get(token, "") + special.get(end, "")
        return f"{{% elif part['type'] == '{kind}' %}}{written}"

    return (
        "{% for message in messages %}{% for part in message['content'] %}"
        "{% if part['type'] == 'text' %}{{ part['text'] }}"
        + medium("image", V_START, IMAGE, V_END)
        + medium("video", V_START, VIDEO, V_END)
        + medium("audio", A_START, AUDIO, A_END)
        + "{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}:{% endif %}"
    )


def tokenizer(special: dict[int, str], omni: bool) -> Any:
    from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast

    words = {i: f"<unused{i}>" for i in range(VOCABULARY)} | {0: "<pad>", 1: "<unk>", END: "<end>"}
    words |= dict(enumerate(CHARACTERS, start=4)) | special
    core = Tokenizer(WordLevel({word: i for i, word in words.items()}, unk_token="<unk>"))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Split(Regex("[ <>]"), "removed")
    core.pre_tokenizer = pre_tokenizers.Sequence([core.pre_tokenizer, pre_tokenizers.Split(Regex("."), "isolated")])
    named = {f"{NAMES[i]}_token": token for i, token in special.items()} if omni else list(special.values())
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", eos_token="<end>", extra_special_tokens=named,
        chat_template=template(special), clean_up_tokenization_spaces=False,
    )  # fmt: skip


def write_processor(folder: Path, name: str, **video: Any) -> Path:
    """The files of a checkpoint's processor beside a config.json; video: settings of videos alone."""
    omni = "omni" in name
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer(SPECIAL["omni" if omni else "vl"], omni).save_pretrained(folder)
    pixels = {"shortest_edge": 16 * 16, "longest_edge": 32 * 32}
    patches = {"patch_size": 4, "merge_size": 2, "temporal_patch_size": 2, "size": pixels}
    settings = {"image_processor_type": "Qwen2VLImageProcessor", **patches}
    if omni:
        settings |= {"feature_extractor_type": "WhisperFeatureExtractor", "feature_size": MEL, "chunk_length": 3}
        settings |= {"return_attention_mask": True}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    kind = "Qwen3VLVideoProcessor" if name == "qwen3_vl" else "Qwen2VLVideoProcessor"
    found = {"video_processor_type": kind, **patches, **video}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(found))
    if not (folder / "config.json").exists():
        (folder / "config.json").write_text(json.dumps({"model_type": MODEL_TYPES.get(name, name)}))
    return folder
