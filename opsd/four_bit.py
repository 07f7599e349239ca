"""A base in four bits a weight: `model.quantize: nf4` (QLoRA, arXiv 2305.14314), computed by bitsandbytes.

    W ~ c[code] * s      c: 16 quantiles of a normal distribution; s: a scale for 64 weights, itself a code of 8 bits

The linear layers of the language part take 4.127 bits a weight. Everything else keeps its dtype: towers, embeddings,
norms, experts that are 3-D parameters, the head, whose weight the loss multiplies by itself, and layers whose width is
no multiple of 64: bitsandbytes 0.50 misreads those on a CPU, where a row begins inside a block of weights. Student,
teacher and rollout compute with the same codes; the adapter runs beside them and is never merged into them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from opsd.bnb import bitsandbytes
from opsd.config import ModelConfig
from opsd.errors import InputError, explained
from opsd.parts import LANGUAGE, part_of
from opsd.say import say_once

_BLOCK, _BLOCK_OF_SCALES = 64, 256


def quantizable(module: Any) -> dict[str, nn.Linear]:
    """The layers of a model, without peft's wrapper, that `model.quantize` turns into codes, by name."""
    head = module.get_output_embeddings()
    return {
        name: child
        for name, child in module.named_modules()
        if type(child) is nn.Linear
        and child is not head
        and part_of(module, name) == LANGUAGE
        and child.in_features % _BLOCK == 0
        and ".lora_" not in name
    }


def reading(config: ModelConfig, outline: Any, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told, for weights that become codes one by one, on the device, as they are read.

    outline: the model without its weights, on meta. dtype: of products.
    """
    from transformers import BitsAndBytesConfig

    bitsandbytes("model.quantize")
    chosen = quantizable(outline)
    if not chosen:
        raise InputError(f"linear layers with a multiple of {_BLOCK} inputs", "none", field="model.quantize")
    others = [name for name, child in outline.named_modules() if isinstance(child, nn.Linear) and name not in chosen]
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=others,
    )
    return {"quantization_config": quantization, "device_map": {"": place(config.device)}}


def place(device: str) -> str:
    """`model.device` with its number, as transformers asks for it. Raises InputError for one that is not there."""
    with explained("auto, or a device of this machine", field="model.device"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        return str(torch.empty(0, device=device).device)


def settled(module: Any, expected: set[str]) -> Any:
    """A model as it was read, checked: these layers are codes, no others. On a CPU they stay as they are laid out."""
    layers = {name: child for name, child in module.named_modules() if is_coded(child)}
    assert layers.keys() == expected, f"other layers than asked for: {sorted(layers.keys() ^ expected)}"
    for layer in layers.values():
        layer.support_avx512bf16_for_cpu = False  # it lays the codes out anew in evaluation, and loses gradients then
    say_once(f"{len(layers)} linear layers of the language model in four bits (nf4)")
    return module


def outlined(module: Any, dtype: torch.dtype) -> Any:
    """A model on meta with codes of the right shapes, and no values, for its weights."""
    library = bitsandbytes("model.quantize")
    for name, linear in quantizable(module).items():
        coded = library.nn.Linear4bit(
            linear.in_features, linear.out_features, linear.bias is not None, dtype, quant_type="nf4", device="meta"
        )
        coded.weight = library.nn.Params4bit(
            _empty(-(-linear.weight.numel() // 2), torch.uint8)[:, None],
            quant_state=_state(library.functional.QuantState, linear.weight.shape, dtype),
            quant_type="nf4",
            module=coded,
            bnb_quantized=True,
        )
        if linear.bias is not None:
            coded.bias = nn.Parameter(linear.bias.detach())
        coded.support_avx512bf16_for_cpu = False
        coded.requires_grad_(False)
        module.set_submodule(name, coded)
    module.is_loaded_in_4bit = True  # as transformers tells peft
    return module


def scales(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of the layers in codes that are no parameters: scales and tables."""
    layers: Iterator[Any] = module.modules()
    for layer in layers:
        if is_coded(layer):
            state = layer.weight.quant_state
            yield from (state.absmax, state.code, state.offset, state.state2.absmax, state.state2.code)


def is_coded(layer: Any) -> bool:
    """Whether its weight is codes; of a layer that peft has wrapped, the one inside."""
    return isinstance(layer, nn.Linear) and getattr(layer.weight, "quant_state", None) is not None


@torch.no_grad()
def round_trip(module: Any) -> float:
    """Every weight that would become codes becomes what they stand for; the largest |new - old| / |old| of a layer."""
    functional, worst = bitsandbytes("model.quantize").functional, 0.0
    for layer in quantizable(module).values():
        old = layer.weight
        new = functional.dequantize_4bit(*functional.quantize_4bit(old, quant_type="nf4", compress_statistics=True))
        worst = max(worst, float((new.float() - old.float()).norm() / old.float().norm()))
        old.copy_(new)
    return worst


def _state(kind: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
    blocks = -(-shape.numel() // _BLOCK)
    of_scales = kind(
        _empty(-(-blocks // _BLOCK_OF_SCALES), torch.float32),
        blocksize=_BLOCK_OF_SCALES,
        code=_empty(256, torch.float32),
        dtype=torch.float32,
    )
    return kind(
        _empty(blocks, torch.uint8),
        shape=shape,
        code=_empty(16, torch.float32),
        blocksize=_BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty((), device="meta"),
        state2=of_scales,
    )


def _empty(size: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(size, dtype=dtype, device="meta")
