"""Whole tiny Omni models: the thinker, and beside it a talker and a vocoder that nothing here trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.families import AUDIO, IMAGE, VIDEO, rope, text

TALKER = {"audio_token_id": AUDIO, "image_token_id": IMAGE, "video_token_id": VIDEO}


def qwen2_5_omni(thinker: Any) -> Any:
    from transformers import Qwen2_5OmniConfig, Qwen2_5OmniForConditionalGeneration

    dit = {
        "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8, "emb_dim": 8,
        "num_embeds": 12, "mel_dim": 8, "enc_emb_dim": 8, "enc_dim": 8, "enc_channels": [8, 8, 8, 8, 24],
        "enc_attention_channels": 4, "enc_se_channels": 4, "look_ahead_layers": [0], "look_backward_layers": [0],
    }  # fmt: skip
    vocoder = {"mel_dim": 8, "upsample_initial_channel": 8, "upsample_rates": [2], "upsample_kernel_sizes": [4]}
    vocoder |= {"resblock_kernel_sizes": [3], "resblock_dilation_sizes": [[1, 3, 5]]}
    return Qwen2_5OmniForConditionalGeneration(
        Qwen2_5OmniConfig(
            thinker_config=thinker.config.to_dict(),
            talker_config={**text(rope_parameters=rope()), "head_dim": 8, "embedding_size": 32, **TALKER},
            token2wav_config={"dit_config": dit, "bigvgan_config": vocoder},
        )
    )


def qwen3_omni_moe(thinker: Any) -> Any:
    from transformers import Qwen3OmniMoeConfig, Qwen3OmniMoeForConditionalGeneration

    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 8}
    inner = text(rope_parameters=rope(mrope_interleaved=True), **experts, shared_expert_intermediate_size=8)
    return Qwen3OmniMoeForConditionalGeneration(
        Qwen3OmniMoeConfig(
            thinker_config=thinker.config.to_dict(),
            talker_config={
                "text_config": {**inner, "head_dim": 8}, "thinker_hidden_size": 32, "num_code_groups": 2,
                "spatial_merge_size": 2,
                "code_predictor_config": {**text(), "head_dim": 8, "num_code_groups": 2}, **TALKER,
            },
            code2wav_config={
                "codebook_size": 8, "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2,
                "intermediate_size": 16, "num_hidden_layers": 1, "num_quantizers": 2, "upsample_rates": [2],
                "upsampling_ratios": [2], "decoder_dim": 8,
            },
        )
    )  # fmt: skip


WHOLE = {"qwen2_5_omni": qwen2_5_omni, "qwen3_omni_moe": qwen3_omni_moe}


def save_whole(folder: Path, name: str, thinker: Any) -> None:
    """Write a whole model around its thinker as transformers does, in several files."""
    torch.manual_seed(1)
    whole = WHOLE[name](thinker)
    with torch.no_grad():
        for p in whole.parameters():  # some are made without a value
            p.normal_(std=0.02)
    whole.thinker.load_state_dict(thinker.state_dict())
    whole.generation_config = thinker.generation_config
    whole.save_pretrained(folder, max_shard_size="30KB")
    if name == "qwen2_5_omni":
        torch.save({"Chelsie": {"cond": torch.zeros(2)}}, folder / "spk_dict.pt")
