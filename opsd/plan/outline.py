"""The model of a config without its weights: every layer on meta, so shapes alone."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from opsd import four_bit
from opsd.autocast import OnMeta
from opsd.config import EngineConfig, ModelConfig
from opsd.loading import model_class, prepared, weight_dtype, without_weights
from opsd.model import LanguageModel
from opsd.offload import Lane, LayerInputs, offload
from opsd.plan.stand_ins import AttentionShapes


class NoTokenizer:
    """Stands where a folder has none: token ids are numbers here."""

    pad_token_id = eos_token_id = 0

    def __init__(self, size: int):
        self.size = size
        self.added_tokens_decoder: dict[int, Any] = {}

    def __len__(self) -> int:
        return self.size


def outline(config: ModelConfig, engine: EngineConfig, processor: Any, cuda: bool) -> LanguageModel:
    """The LanguageModel of a folder or hub id of which only config.json is read. processor: None where there is none.

    cuda: attend as on CUDA. Raises InputError as `opsd.loading.load_model` does.
    """
    cls = model_class(config.path, config)
    bare = without_weights(cls, config.path, config)
    if config.quantize != "none":
        bare = four_bit.outlined(bare, weight_dtype(config))
    with torch.device("meta"):
        module = prepared(bare, config, config.path)
    processor = processor if processor is not None else NoTokenizer(module.get_output_embeddings().weight.shape[0])
    model = LanguageModel(module.eval(), processor, {}, config, engine)
    half = model.head.weight.dtype == torch.bfloat16 or model.mixed
    model.attention = AttentionShapes(ragged=cuda and half)
    checkpointed(model)
    return model


def checkpointed(model: LanguageModel, lane: Lane | None = None) -> None:
    """Activation checkpointing as the model's config has it, on meta. lane: to the host of a plan."""
    options = {"context_fn": _recomputed} if model.mixed else {}  # torch opens autocast again for the second forward
    if model.config.activation_checkpointing == "offload":
        offload(model.module, LayerInputs(lane), **options)
    elif model.config.activation_checkpointing:
        model.module.gradient_checkpointing_enable({"use_reentrant": False, **options})


def _recomputed() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    return nullcontext(), OnMeta(torch.bfloat16)
