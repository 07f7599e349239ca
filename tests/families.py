"""Every family the packed engine computes, tiny: its config, and prompts as its processor makes them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from opsd.prompts import Prompt

PAD, END, IMAGE, VIDEO, AUDIO, V_START, V_END, A_START, A_END, VOCABULARY = 0, 2, 50, 51, 52, 53, 54, 55, 56, 64
TOKENIZER = SimpleNamespace(pad_token_id=PAD, eos_token_id=END, added_tokens_decoder={})
MEL = 16


@dataclass(frozen=True)
class Family:
    name: str
    config: Callable[[], tuple[str, Any]]  # class name, config
    media: tuple[str, ...] = ()  # image, video, audio
    axes: int = 1


def text(heads: int = 4, kv: int = 2, layers: int = 2, **more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "max_position_embeddings": 512,
        "pad_token_id": PAD,
        "eos_token_id": END,
        "bos_token_id": None,
        "tie_word_embeddings": False,
        **more,
    }


def rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [2, 1, 1], **more}


VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 32,
}
WINDOWED = {**VISION, "window_size": 16, "fullatt_block_indexes": [1]}
# Of two layers of the tower, behind the first two of the decoder: a third sees what both have added.
DEEPSTACK = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
AUDIO_TOWER = {
    "num_mel_bins": MEL,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "d_model": 16,
    "max_source_positions": 60,
    "output_dim": 32,
    "n_window": 50,  # Qwen3-Omni counts tokens for this one only
}


def llama() -> tuple[str, Any]:
    from transformers import LlamaConfig

    return "LlamaForCausalLM", LlamaConfig(**text(tie_word_embeddings=True))


def qwen2() -> tuple[str, Any]:
    """Qwen2 and Qwen2.5: one class."""
    from transformers import Qwen2Config

    return "Qwen2ForCausalLM", Qwen2Config(**text())


def qwen2_windowed() -> tuple[str, Any]:
    from transformers import Qwen2Config

    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}
    return "Qwen2ForCausalLM", Qwen2Config(**text(**window))


def qwen3() -> tuple[str, Any]:
    from transformers import Qwen3Config

    return "Qwen3ForCausalLM", Qwen3Config(**text(head_dim=16))


def gemma3() -> tuple[str, Any]:
    """Windows shorter than a prompt and its response, in two layers of three; a softcap on the logits."""
    from transformers import Gemma3TextConfig

    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    more = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "layer_types": kinds}
    more |= {"tie_word_embeddings": True, "final_logit_softcapping": 4.0}
    return "Gemma3ForCausalLM", Gemma3TextConfig(**text(layers=3, **more))


def granite() -> tuple[str, Any]:
    """Logits, embeddings, residuals and attention scores that are scaled."""
    from transformers import GraniteConfig

    scales = {"logits_scaling": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.7}
    return "GraniteForCausalLM", GraniteConfig(**text(**scales, attention_multiplier=0.3))


def cohere() -> tuple[str, Any]:
    from transformers import CohereConfig

    return "CohereForCausalLM", CohereConfig(**text(logit_scale=0.3, tie_word_embeddings=True))


def phi() -> tuple[str, Any]:
    """A head with a bias, and rotary positions on half of a head's width."""
    from transformers import PhiConfig

    return "PhiForCausalLM", PhiConfig(**text(partial_rotary_factor=0.5))


def qwen2_5_vl() -> tuple[str, Any]:
    from transformers import Qwen2_5_VLConfig

    return "Qwen2_5_VLForConditionalGeneration", Qwen2_5_VLConfig(
        text_config=text(rope_parameters=rope()), vision_config=WINDOWED, image_token_id=IMAGE, video_token_id=VIDEO,
        vision_start_token_id=V_START, vision_end_token_id=V_END,
    )  # fmt: skip


def qwen3_vl() -> tuple[str, Any]:
    from transformers import Qwen3VLConfig

    return "Qwen3VLForConditionalGeneration", Qwen3VLConfig(
        text_config=text(head_dim=8, rope_parameters=rope(mrope_interleaved=True), layers=3), vision_config=DEEPSTACK,
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=V_START, vision_end_token_id=V_END,
    )  # fmt: skip


def qwen2_5_omni() -> tuple[str, Any]:
    from transformers import Qwen2_5OmniThinkerConfig

    return "Qwen2_5OmniThinkerForConditionalGeneration", Qwen2_5OmniThinkerConfig(
        text_config=text(rope_parameters=rope()), vision_config=WINDOWED, audio_config=AUDIO_TOWER,
        audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO, audio_start_token_id=A_START,
        audio_end_token_id=A_END, vision_start_token_id=V_START, vision_end_token_id=V_END, pad_token_id=PAD,
    )  # fmt: skip


def qwen3_omni_moe() -> tuple[str, Any]:
    from transformers import Qwen3OmniMoeThinkerConfig

    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
    return "Qwen3OmniMoeThinkerForConditionalGeneration", Qwen3OmniMoeThinkerConfig(
        text_config=text(head_dim=8, rope_parameters=rope(mrope_interleaved=True), layers=3, **experts),
        vision_config=DEEPSTACK, audio_config={**AUDIO_TOWER, "downsample_hidden_size": 8},
        audio_token_id=AUDIO, image_token_id=IMAGE, video_token_id=VIDEO, audio_start_token_id=A_START,
        vision_start_token_id=V_START, vision_end_token_id=V_END,
    )  # fmt: skip


FAMILIES = {
    family.name: family
    for family in (
        Family("llama", llama),
        Family("qwen2", qwen2),
        Family("qwen2_windowed", qwen2_windowed),
        Family("qwen3", qwen3),
        Family("gemma3", gemma3),
        Family("granite", granite),
        Family("cohere", cohere),
        Family("phi", phi),
        Family("qwen2_5_vl", qwen2_5_vl, ("image", "video"), 3),
        Family("qwen3_vl", qwen3_vl, ("image", "video"), 3),
        Family("qwen2_5_omni", qwen2_5_omni, ("image", "audio", "video"), 3),
        Family("qwen3_omni_moe", qwen3_omni_moe, ("image", "audio", "video"), 3),
    )
}


def build(family: Family, seed: int = 0) -> Any:
    """Random weights large enough that a wrong position, key or medium shows."""
    import transformers

    cls, config = family.config()
    torch.manual_seed(seed)
    module = getattr(transformers, cls)(config)
    with torch.no_grad():
        for p in module.parameters():
            if p.ndim > 1:
                p.normal_(std=1.5 * p.shape[-1] ** -0.5)
            else:
                p.uniform_(0.5, 1.5)
    return module.eval()


def image(generator: torch.Generator, rows: int, columns: int, frames: int = 1) -> tuple[Tensor, Tensor]:
    """Patches (frames rows columns, 3 * 2 * 4 * 4) and their grid (1, 3)."""
    patches = torch.randn(frames * rows * columns, 96, generator=generator, dtype=torch.float64)
    return patches, torch.tensor([[frames, rows, columns]])


def sound_tokens(family: Family, frames: int) -> int:
    if family.name == "qwen2_5_omni":
        return ((frames - 1) // 2 + 1 - 2) // 2 + 1
    left = frames % 100
    return (((left + 1) // 2 + 1) // 2 + 1) // 2 + frames // 100 * 13


class Builder:
    """Writes one prompt part by part, as a processor would."""

    def __init__(self, family: Family, seed: int):
        self.family, self.ids, self.kinds = family, list[int](), list[int]()
        self.media: dict[str, list[Tensor]] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def text(self, length: int) -> Builder:
        return self._write(torch.randint(4, 45, (length,), generator=self.generator).tolist(), 0)

    def image(self, rows: int = 4, columns: int = 4) -> Builder:
        patches, grid = image(self.generator, rows, columns)
        self._keep(pixel_values=patches, image_grid_thw=grid)
        return self._run(V_START, IMAGE, rows * columns // 4, V_END, 1)

    def video(self, frames: int, rows: int = 4, columns: int = 4) -> Builder:
        patches, grid = image(self.generator, rows, columns, frames)
        self._keep(pixel_values_videos=patches, video_grid_thw=grid)
        if self.family.name == "qwen2_5_vl":
            self._keep(second_per_grid_ts=torch.tensor([0.75]))
        if "omni" in self.family.name:
            self._keep(video_second_per_grid=torch.tensor([0.75]))
        if self.family.name != "qwen3_vl":
            return self._run(V_START, VIDEO, frames * rows * columns // 4, V_END, 2)
        for _ in range(frames):  # a time stamp before every frame
            self.text(2)._run(V_START, VIDEO, rows * columns // 4, V_END, 2)
        return self

    def sound(self, frames: int) -> Builder:
        mel = torch.randn(1, MEL, frames, generator=self.generator, dtype=torch.float64)
        self._keep(input_features=mel, feature_attention_mask=torch.ones(1, frames, dtype=torch.long))
        return self._run(A_START, AUDIO, sound_tokens(self.family, frames), A_END, 0)

    def prompt(self) -> Prompt:
        ids = torch.tensor([self.ids])
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if self.family.name.endswith("_vl"):
            inputs["mm_token_type_ids"] = torch.tensor([self.kinds])
        for name, parts in self.media.items():
            if name in ("input_features", "feature_attention_mask"):
                width = max(part.shape[-1] for part in parts)
                parts = [torch.nn.functional.pad(part, (0, width - part.shape[-1])) for part in parts]
            inputs[name] = torch.cat(parts)
        return Prompt(inputs, "")

    def _run(self, start: int, token: int, n: int, end: int, kind: int) -> Builder:
        return self._write([start], 0)._write([token] * n, kind)._write([end], 0)

    def _write(self, ids: list[int], kind: int) -> Builder:
        self.ids += ids
        self.kinds += [kind] * len(ids)
        return self

    def _keep(self, **tensors: Tensor) -> None:
        for name, value in tensors.items():
            self.media.setdefault(name, []).append(value)


def prompts(family: Family, rationale: int = 0, seed: int = 0) -> list[Prompt]:
    """Ragged, with media of every kind, two of a kind in one prompt, none in another. rationale: extra text tokens."""

    def start(i: int) -> Builder:
        return Builder(family, seed + i)

    if not family.media:
        lengths = (6, 1, 11)
        return [start(i).text(n + rationale).prompt() for i, n in enumerate(lengths)]
    if "audio" not in family.media:
        built = [
            start(0).text(3).image().text(2),
            start(1).text(1),
            start(2).text(1).image(4, 6).text(2).image().text(1).video(2).text(3),
        ]
    else:
        built = [
            start(0).text(3).image().text(1).sound(20).text(2),
            start(1).text(2).sound(120).text(1).image(4, 6).text(1).sound(31).text(2),
            start(2).text(2).video(2).text(1).image().text(2),
        ]
    return [one.text(rationale).prompt() for one in built]


class Double(TorchFunctionMode):
    """transformers' norms, rotary positions and routers compute in fp32 whatever the weights are: here in fp64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        wide = lambda x: torch.float64 if x is torch.float32 else x  # noqa: E731
        return func(*map(wide, args), **{name: wide(value) for name, value in (kwargs or {}).items()})
