"""Files that any safetensors reader opens, and that notice every kind of damage."""

from __future__ import annotations

import pytest
import torch
from safetensors import safe_open

from opsd.tensor_file import Damaged, TensorFile, read

TENSORS = {
    "half": torch.randn(3, 5).bfloat16(),
    "fp16": torch.tensor([1.5], dtype=torch.float16),
    "ids": torch.arange(4),
    "strided": torch.randn(4, 3).T,
    "none": torch.zeros(0, 2),
    "double": torch.tensor(0.1, dtype=torch.float64),
}


def test_what_is_read_is_what_was_written(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    file = TensorFile(TENSORS, {"a": "é"})
    file.write(path)
    assert path.stat().st_size == file.size
    tensors, words = read(path)
    assert words == {"a": "é"}
    with safe_open(path, framework="pt") as library:
        assert set(library.keys()) == tensors.keys() == TENSORS.keys()
        assert library.metadata()["a"] == "é"
        for name, tensor in TENSORS.items():
            for found in (tensors[name], library.get_tensor(name)):
                assert found.dtype == tensor.dtype and found.shape == tensor.shape and torch.equal(found, tensor)


def test_every_flipped_bit_and_every_truncation_is_noticed(tmp_path) -> None:
    path = tmp_path / "x.safetensors"
    TensorFile({"a": torch.arange(3.0), "b": torch.arange(2)}, {"of": "b"}).write(path)
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    for position in range(len(good)):
        path.write_bytes(good[:position] + bytes([good[position] ^ 1 << position % 8]) + good[position + 1 :])
        harmless = position < header and good[position] == ord(" ")  # space to tab reads as the same header
        try:
            tensors, words = read(path)
        except Damaged:
            continue
        assert harmless and words == {"of": "b"} and torch.equal(tensors["a"], torch.arange(3.0))
    for length in range(len(good)):
        path.write_bytes(good[:length])
        with pytest.raises(Damaged):
            read(path)
    path.write_bytes(good + b"\0")
    with pytest.raises(Damaged):
        read(path)


def test_a_dtype_it_does_not_know_is_named() -> None:
    with pytest.raises(ValueError, match=r"expected one of .*BF16.*, got torch.complex64 in a"):
        TensorFile({"a": torch.zeros(1, dtype=torch.complex64)}, {})
