"""Open the model of a config: its class, its weights, what is frozen, the adapter; every problem named."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd import four_bit
from opsd.adapter import add_lora
from opsd.config import EngineConfig, ModelConfig
from opsd.errors import InputError, explained
from opsd.families import install
from opsd.integrations.hf import logit_changes, output_head
from opsd.liger import use_liger
from opsd.logits import logits_of
from opsd.model import LanguageModel
from opsd.offload import LayerInputs, offload
from opsd.parts import freeze

# Checkpoints that speak too are opened as the part that reads and writes text.
_THINKERS = {
    "Qwen2_5OmniModel": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen2_5OmniForConditionalGeneration": "Qwen2_5OmniThinkerForConditionalGeneration",
    "Qwen3OmniMoeForConditionalGeneration": "Qwen3OmniMoeThinkerForConditionalGeneration",
}


def load_model(
    config: ModelConfig, seed: int = 0, checkpoint: Path | None = None, engine: EngineConfig | None = None
) -> LanguageModel:
    """Load model and processor from a folder or hub id, freeze what the config freezes, add the adapter.

    seed: of a fresh adapter. checkpoint: a folder with trained weights, or a trained adapter, to take instead of the
    starting ones. engine: how packed rows are computed. Raises InputError for a path that holds no whole model and
    processor, a family the engine does not handle, an output head it cannot use, and for a device, attention,
    adapter or Liger that does not work here.
    """
    from transformers.utils import logging

    from opsd.processing import load_processor, read_processor_files

    logging.disable_progress_bar()  # ours is on the terminal
    source = config.path if checkpoint is None or config.adapter == "lora" else str(checkpoint)
    module = prepared(_read_weights(source, config), config, source, seed, checkpoint)
    with explained("a tokenizer, and a processor where the model has media", field="model.path"):
        processor = load_processor(source, trust_remote_code=config.trust_remote_code)
        files = read_processor_files(source)
    with explained("auto, or a device of this machine", field="model.device"):
        module.to(four_bit.place(config.device))
    model = LanguageModel(module.eval(), processor, files, config, engine or EngineConfig())
    model.check_attention()
    _check_logits(model)
    model.fused = use_liger(model._base.get_decoder(), config.liger, model.device.type)
    return model


def prepared(module: Any, config: ModelConfig, source: str, seed: int = 0, checkpoint: Path | None = None) -> Any:
    """The model checked, what the config freezes frozen, with its adapter and checkpointing."""
    _check_head(module, source)
    install(module)
    freeze(module, config.freeze)
    if config.adapter == "lora":
        module = add_lora(module, config, seed, checkpoint)
    if config.activation_checkpointing == "offload":
        offload(module, LayerInputs())
    elif config.activation_checkpointing:
        module.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if not any(p.requires_grad for p in module.parameters()):
        raise InputError("something left to train", repr(list(config.freeze)), field="model.freeze")
    return module


def is_whole(config: ModelConfig) -> bool:
    """Whether the model of the config lies in a checkpoint that has a talker beside it."""
    return _architecture(_read_config(config.path, config)) in _THINKERS


def _read_config(path: str, config: ModelConfig) -> Any:
    from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig

    with explained("a model folder or hub id", field="model.path"):
        raw, _ = PreTrainedConfig.get_config_dict(path)
        own = raw.get("auto_map", {}).get("AutoConfig")
        if own and raw.get("model_type") not in CONFIG_MAPPING and not config.trust_remote_code:
            found = f"{path}, which brings code of its own ({own})"
            hint = "model.trust_remote_code=true runs it"
            raise InputError("a model that transformers knows", found, field="model.path", hint=hint)
        return AutoConfig.from_pretrained(path, trust_remote_code=config.trust_remote_code)


def _architecture(hf_config: Any) -> str:
    return (hf_config.architectures or ["(none)"])[0]


def model_class(path: str, config: ModelConfig) -> Any:
    """The class that the model's config names; of a full Omni checkpoint, its thinker's."""
    import transformers

    hf_config = _read_config(path, config)
    architecture = _architecture(hf_config)
    architecture = _THINKERS.get(architecture, architecture)
    cls: Any = getattr(transformers, architecture, object)
    is_model = isinstance(cls, type) and issubclass(cls, transformers.PreTrainedModel)
    if not is_model or hf_config.is_encoder_decoder:
        found = f"{architecture} in {path}"
        raise InputError("a decoder architecture known to transformers", found, field="model.path")
    return cls


def weight_dtype(config: ModelConfig) -> torch.dtype:
    """Trained weights are fp32: at lr 1e-6 a bf16 weight would not move."""
    return torch.bfloat16 if config.dtype == "bfloat16" and config.adapter == "lora" else torch.float32


def _read_weights(path: str, config: ModelConfig) -> Any:
    """The model with every weight read."""
    cls, coding, coded = model_class(path, config), {}, set[str]()
    if config.quantize != "none":
        bare = without_weights(cls, path, config)
        coding, coded = four_bit.reading(config, bare, weight_dtype(config)), set(four_bit.quantizable(bare))
    with explained("weights that load, and model.attention that they support", field="model.path"):
        module, report = _quietly(
            cls.from_pretrained,
            path,
            dtype=weight_dtype(config),
            attn_implementation=config.attention,
            trust_remote_code=config.trust_remote_code,
            output_loading_info=True,
            **coding,
        )
    if missing := sorted(report["missing_keys"]):
        names = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise InputError(f"all weights of {cls.__name__}", f"{path} without {names}", field="model.path")
    return four_bit.settled(module, coded) if coding else module


def without_weights(cls: Any, path: str, config: ModelConfig) -> Any:
    """The model on meta, of which config.json alone is read."""
    with explained("a config that transformers builds a model from", field="model.path"), torch.device("meta"):
        found = cls.config_class.from_pretrained(path, trust_remote_code=config.trust_remote_code)
        if config.quantize != "none" and getattr(found, "quantization_config", None) is not None:
            raise InputError("none for weights that are codes already", config.quantize, field="model.quantize")
        return cls._from_config(found, dtype=weight_dtype(config), attn_implementation=config.attention)


def _quietly(load: Callable[..., Any], *args: Any, **options: Any) -> Any:
    """Without transformers' table of what was not read, such as a talker; what is missing is checked here."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        return load(*args, **options)
    finally:
        logging.set_verbosity(before)


def _check_head(module: Any, path: str) -> None:
    name = type(module).__name__
    head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None
    if head is None or not isinstance(getattr(head, "weight", None), Tensor):
        found = f"{name} in {path}, which has none"
        raise InputError("a model with an output head (a causal language model)", found, field="model.path")
    with explained("an output head that the loss can take", field="model.path"):
        output_head(module)


@torch.no_grad()
def _check_logits(model: LanguageModel) -> None:
    """The head as it is read must give the model's own logits: the loss would see another distribution otherwise."""
    head, module = model.head, model.module
    drawn = torch.randn(1, 1, head.weight.shape[1], generator=torch.Generator().manual_seed(0))
    states = 100.0 * drawn.to(head.weight)  # so large that a softcap bends the logits
    hook = module.get_output_embeddings().register_forward_pre_hook(lambda *_: (states,))
    try:
        ids = torch.tensor([[model.end_ids[0]]], device=model.device)
        own = module(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        hook.remove()
    if (own - logits_of(states[0], head)).abs().max() > 0.02 * own.abs().max():
        changes = ", ".join(f"{key}={value}" for key, value in logit_changes(module).items()) or "nothing that tells"
        found = f"others in {type(model._base).__name__}, whose config says {changes}"
        raise InputError("logits that follow from the head and the config", found, field="model.path")
