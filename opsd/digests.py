"""What a tensor, a medium or a model is, as a hex digest of all its bytes (SHA-256)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

_THREADS = 4  # hashing lets go of the interpreter; each thread holds one tensor on the host
_NOT_CONTENT = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}  # a dtype is in the weights


def tensor_bytes(tensor: Tensor) -> memoryview:
    """The bytes of a tensor in host memory, row-major; without a copy where it lies there contiguously."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def media_digest(*tensors: Tensor) -> str:
    """One medium (pixels and grid, features and mask, ...): dtype, shape and bytes of its tensors, in this order."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tensor.dtype}{tuple(tensor.shape)}".encode())
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()


def media_digests(inputs: Mapping[str, Tensor], besides: tuple[str, ...]) -> tuple[str, ...]:
    """One digest per media input of a prompt, by name, without the inputs named `besides` (those of its tokens)."""
    return tuple(f"{name}:{media_digest(inputs[name])}" for name in sorted(inputs) if name not in besides)


def model_identity(module: Any, compute: str = "") -> str:
    """Class, config and every weight and buffer in use, exact. It reads all weights: call it once.

    compute: what else the result of a forward pass depends on, such as the dtype of autocast. With an adapter, this is
    the identity of the model under it, the same as that of the model without one.
    """
    base = module.get_base_model() if hasattr(module, "get_base_model") else module
    weights = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in base.state_dict().items()
        if isinstance(tensor, Tensor) and "lora_" not in name
    }
    names = sorted(weights)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(lambda name: media_digest(weights[name]), names)
        config = base.config.to_dict() if hasattr(base, "config") else {}
        about = {
            "class": type(base).__name__,
            "compute": compute,
            "config": {key: value for key, value in config.items() if key not in _NOT_CONTENT},
            "weights": dict(zip(names, digests, strict=True)),
        }
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()
