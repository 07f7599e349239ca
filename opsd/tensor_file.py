"""Tensors and a few words about them in one safetensors file, with a checksum over all of it.

    8 bytes: length of the header | header: JSON | tensors, row-major, largest elements first

The library writes no checksum, refuses tensors that share a buffer, and reads through a memory map, where an error of
the disk kills the process. Here one read fills one buffer, and every kind of damage is an exception. Any safetensors
reader opens the files. Source of the layout: github.com/huggingface/safetensors, "Format".
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd.digests import tensor_bytes

_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int8: "I8",
    torch.float8_e4m3fn: "F8_E4M3",
}
_DTYPES = {code: dtype for dtype, code in _CODES.items()}


class Damaged(Exception):
    """The file is not what was written."""


class TensorFile:
    """Ready to be written: `size` bytes."""

    def __init__(self, tensors: Mapping[str, Tensor], words: Mapping[str, str]):
        ordered = sorted(tensors.items(), key=lambda item: -item[1].element_size())  # so that every element is aligned
        self._data = [tensor_bytes(tensor) for _, tensor in ordered]
        header: dict[str, Any] = {"__metadata__": dict(words)}
        end = 0
        for name, tensor in ordered:
            if tensor.dtype not in _CODES:
                raise ValueError(f"expected one of {', '.join(_DTYPES)}, got {tensor.dtype} in {name}")
            start, end = end, end + tensor.nbytes
            header[name] = {
                "dtype": _CODES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [start, end],
            }
        header["__metadata__"]["crc32"] = _checksum(header, *self._data)
        text = json.dumps(header).encode()
        self._header = text + b" " * (-len(text) % 8)
        self.size = 8 + len(self._header) + end

    def write(self, path: Path) -> None:
        """Returns when the bytes are on the disk."""
        with path.open("wb") as file:
            file.write(len(self._header).to_bytes(8, "little"))
            file.write(self._header)
            for data in self._data:
                file.write(data)
            file.flush()
            os.fsync(file.fileno())


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors, views of one buffer, and words. Raises Damaged, or OSError where the file cannot be read."""
    with path.open("rb") as file:
        buffer = torch.empty(os.fstat(file.fileno()).st_size, dtype=torch.uint8)
        got = file.readinto(buffer.numpy().data)
    try:
        start = 8 + int.from_bytes(bytes(tensor_bytes(buffer[:8])), "little")
        header = json.loads(bytes(tensor_bytes(buffer[8:start])))
        words = header["__metadata__"]
        data = buffer[start:]
        if got != len(buffer) or words.pop("crc32") != _checksum(header, tensor_bytes(data)):
            raise Damaged(str(path))
        del header["__metadata__"]
        return {name: _view(data, entry) for name, entry in header.items()}, words
    except Exception as error:  # whatever bytes can do to a parser
        raise Damaged(str(path)) from error


def _view(data: Tensor, entry: dict[str, Any]) -> Tensor:
    first, last = entry["data_offsets"]
    return data[first:last].view(_DTYPES[entry["dtype"]]).view(entry["shape"])


def _checksum(header: dict[str, Any], *data: memoryview) -> str:
    """CRC-32 of the header, less the checksum itself, and of the data."""
    crc = zlib.crc32(json.dumps(header, sort_keys=True).encode())
    for part in data:
        crc = zlib.crc32(part, crc)
    return f"{crc:08x}"
