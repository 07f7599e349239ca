"""A computed prefix, and the key it may be found under.

Letters: P prefix tokens, L layers, H key heads, d head width, D model width.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from opsd.digests import tensor_bytes

_FORMAT = 1  # of the files named by a digest


@dataclass(frozen=True)
class Version:
    """Whose weights computed a prefix.

    A frozen model is its content (`digests.model_identity`), in this run and in any other. One that moves counts its
    updates, a number that means something in this process alone: its prefixes never go to disk.
    """

    model: str
    updates: int | None = None  # None: frozen

    @property
    def lasting(self) -> bool:
        return self.updates is None


@dataclass(frozen=True)
class PrefixKey:
    """The key says all that determines a prefix, so equal keys are the same prefix: looking up compares it whole, and
    a collision of hashes, Python's or the digest's, is a miss."""

    version: Version
    tokens: bytes  # of the (P,) int64 token ids
    media: tuple[str, ...]  # digests, in the order of the prompt

    @staticmethod
    def of(version: Version, token_ids: Tensor, media: Sequence[str] = ()) -> PrefixKey:
        """token_ids: (P,) or (1, P) int64, best on the host."""
        if token_ids.dtype != torch.int64:
            raise ValueError(f"expected token ids of int64, got {token_ids.dtype}")
        return PrefixKey(version, bytes(tensor_bytes(token_ids)), tuple(media))

    @property
    def length(self) -> int:
        """P."""
        return len(self.tokens) // 8

    @property
    def digest(self) -> str:
        """SHA-256 of everything in the key: the name of its file."""
        about = json.dumps([_FORMAT, self.version.model, self.version.updates, self.media, self.length])
        return hashlib.sha256(about.encode() + self.tokens).hexdigest()


@dataclass(frozen=True)
class Stored:
    """A computed prefix. It is shared by whoever finds it: attend to it, never write into it.

    In a store that keeps codes (opsd.prefix_codes) keys and values are these, and have scales.
    """

    keys: list[Tensor]  # L of (H, P, d); a windowed layer may hold fewer positions
    values: list[Tensor]  # L of (H, P, d)
    next_position: float  # of the first response token; a fraction after a video in Qwen3-Omni
    last_hidden: Tensor  # (D,) predicts the first response token
    scales: list[Tensor] = field(default_factory=list)  # of codes: L of the keys, L of the values, fp32
    error: Tensor | None = None  # (2,) fp32, of coded keys and values

    def tensors(self) -> list[Tensor]:
        coding = [] if self.error is None else [*self.scales, self.error]
        return [*self.keys, *self.values, self.last_hidden, *coding]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors())

    def with_tensors(self, tensors: Sequence[Tensor]) -> Stored:
        """The same prefix held by other tensors, in the order of `tensors`."""
        layers, coding = len(self.keys), list(tensors[2 * len(self.keys) + 1 :])
        return replace(
            self,
            keys=list(tensors[:layers]),
            values=list(tensors[layers : 2 * layers]),
            last_hidden=tensors[2 * layers],
            scales=coding[:-1],
            error=coding[-1] if coding else None,
        )

    def to(self, device: torch.device) -> Stored:
        """On `device`, in the order of its current stream; itself where it is there already."""
        if all(tensor.device == device for tensor in self.tensors()):
            return self
        return self.with_tensors([tensor.to(device, non_blocking=True) for tensor in self.tensors()])
