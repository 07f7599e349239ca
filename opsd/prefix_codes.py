"""Computed prefixes in one byte a number instead of two or four: `engine.prefix_dtype`, a named approximation.

    s[h, c] = max_p |K[h, p, c]| / q      keys: a scale for each channel of a head, over the P tokens
    s[h, p] = max_c |V[h, p, c]| / q      values: a scale for each token of a head
    code = x / s, rounded to the nearest  int8: q = 127; fp8 (e4m3): q = 448
    found = s * code

A few channels of keys are large in every token, while no channel of values is: keys are coded along channels, values
along tokens (KIVI, arXiv 2402.02750). An int8 code is off by at most s / 2, so 1/254 of the largest number it shares
its scale with; an fp8 code by at most 1/16 of its own number, above the smallest ones.

The error is the largest |found - x| / |x| of a layer (Frobenius norms), of keys and of values.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from opsd.prefix_entry import Stored

_CODES = {"int8": (torch.int8, 127.0), "fp8": (torch.float8_e4m3fn, 448.0)}
_TOKENS, _CHANNELS = 1, 2  # axes of (H, P, d)


def encode(stored: Stored, kind: str) -> Stored:
    """The prefix as codes, with their scales and error. kind: int8 or fp8."""
    keys = [_coded(x, kind, _TOKENS) for x in stored.keys]
    values = [_coded(x, kind, _CHANNELS) for x in stored.values]
    error = torch.stack([torch.stack([error for *_, error in side]).amax() for side in (keys, values)])
    return replace(
        stored,
        keys=[code for code, *_ in keys],
        values=[code for code, *_ in values],
        scales=[scale for _, scale, _ in (*keys, *values)],
        error=error,
    )


def decode(coded: Stored) -> Stored:
    """The prefix that `encode` was given, to within its error, in its dtype."""
    dtype, layers = coded.last_hidden.dtype, len(coded.keys)
    keys, values = (
        [_found(code, scale).to(dtype) for code, scale in zip(codes, scales, strict=True)]
        for codes, scales in ((coded.keys, coded.scales[:layers]), (coded.values, coded.scales[layers:]))
    )
    return replace(coded, keys=keys, values=values, scales=[], error=None)


def _coded(x: Tensor, kind: str, axis: int) -> tuple[Tensor, Tensor, Tensor]:  # (H, P, d), fp32 scales, ()
    """Codes of a layer, a scale for all numbers along `axis`, and the error. What is no number stays none."""
    dtype, largest = _CODES[kind]
    exact = x.float()
    scale = (exact.abs().amax(axis, keepdim=True) / largest).clamp_min(torch.finfo(torch.float32).tiny)
    code = exact / scale
    code = (code.round() if dtype == torch.int8 else code).to(dtype)
    error = (_found(code, scale) - exact).norm() / exact.norm().clamp_min(torch.finfo(torch.float32).tiny)
    return code, scale, error


def _found(code: Tensor, scale: Tensor) -> Tensor:
    return code.float() * scale
