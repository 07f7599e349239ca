"""Which kernel computes the attention of a packed row: chosen by device, dtype and what is installed, said once."""

from __future__ import annotations

import logging
from functools import lru_cache
from importlib import util
from typing import Literal

import torch
from torch import Tensor

from opsd.attention_kernels import CPU_FLASH, CUDA_FLASH, DENSE, Kernel
from opsd.errors import InputError

log = logging.getLogger(__name__)

Choice = Literal["auto", "flash_attn", "flash", "dense"]

_HEAD_DIM = 256  # flash kernels on CUDA go up to here, in steps of 8


def choose_kernel(query: Tensor, choice: Choice | Kernel = "auto") -> Kernel:
    """The kernel for a query (1, H, S, d); one that is given instead of a name is taken as it is.

    Raises InputError where `engine.attention` names one that cannot run it.
    """
    if not isinstance(choice, str):
        return choice
    capability = torch.cuda.get_device_capability(query.device) if query.device.type == "cuda" else (0, 0)
    return _choose(choice, query.device.type, query.dtype, query.shape[-1], capability)


@lru_cache(maxsize=64)
def _choose(choice: Choice, device: str, dtype: torch.dtype, width: int, capability: tuple[int, int]) -> Kernel:
    """Cached, so that a choice is logged once and costs a lookup in each layer."""
    half = dtype in (torch.float16, torch.bfloat16) and width % 8 == 0 and width <= _HEAD_DIM
    cuda_flash = device == "cuda" and half and capability >= (8, 0)
    if choice == "flash_attn" or (choice == "auto" and cuda_flash and util.find_spec("flash_attn") is not None):
        kernel = _flash_attn() if cuda_flash else None
    elif choice == "dense":
        kernel = DENSE
    else:
        kernel = CPU_FLASH if device == "cpu" else CUDA_FLASH if cuda_flash else None
    where = f"{str(dtype).removeprefix('torch.')} with heads of {width} on {device}"
    if kernel is None and choice != "auto":
        raise InputError(f"attention that works for {where}", choice, field="engine.attention", hint="auto chooses")
    kernel = kernel or DENSE
    log.info("attention of packed rows: %s, for %s", kernel.name, where)
    return kernel


def _flash_attn() -> Kernel:
    try:
        from opsd.attention_flash_attn import FLASH_ATTN
    except ImportError as error:
        found = f"{error}"
        raise InputError("flash-attn 2.7 or later", found, field="engine.attention", hint="flash is torch's") from error
    return FLASH_ATTN
