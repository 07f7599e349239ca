"""`python -m opsd.export RUN_DIR OUT`: a finished run as a folder that plain transformers loads.

The newest checkpoint's student with its adapter merged in, processor and generation config, in safetensors. `--full`
puts a thinker that was trained out of a whole Omni checkpoint back beside its talker; `--dequantize` is asked for where
the adapter was trained on four bits, and takes what these stand for as the base. The folder is a model like any other,
the base of a next stage for instance; it appears when it is complete, or not at all.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from opsd.answers import finished_run, load_student
from opsd.cli import guard
from opsd.config import Config
from opsd.errors import InputError, writing
from opsd.four_bit import round_trip
from opsd.loading import is_whole
from opsd.model import LanguageModel

_PREFIX = "thinker."


def export(run_dir: Path, out: Path, full: bool = False, dequantize: bool = False) -> str:
    """Write the student of a run to the new folder `out`; what to say about it. Raises InputError."""
    config, checkpoint = finished_run(run_dir)
    coded = config.model.quantize != "none"
    if coded != dequantize:
        found = f"model.quantize={config.model.quantize}"
        hint = f"the adapter alone, for a base in four bits, is {checkpoint}" if coded else None
        expected = "--dequantize, to merge into what four bits stand for" if coded else "a base in four bits"
        raise InputError(expected, found, field="RUN_DIR" if coded else "--dequantize", hint=hint)
    if full and not is_whole(config.model):
        raise InputError("a run that began from a whole Omni checkpoint", config.model.path, field="--full")
    with _appearing(out) as folder:
        model = load_student(_on_cpu(config), checkpoint)
        apart = round_trip(model.module.get_base_model()) if coded else 0.0
        name = _save(model, folder / "thinker" if full else folder)
        if full:
            _assemble(_local(config.model.path), folder)
    error = f"; its base is what four bits held, up to {apart:.1%} of a layer's norm from {config.model.path}"
    if full:
        told = f"{out}: the whole model, talker and all; the talker was not trained with this thinker"
        return told + (error if coded else "")
    told = f"{out}: transformers.{name}.from_pretrained({str(out)!r})" + (error if coded else "")
    with suppress(InputError):  # the model it began from may be gone: a checkpoint of all weights does without
        if is_whole(config.model):
            told += f"\nthis is the thinker of {config.model.path}; --full writes the whole model"
    return told


def _on_cpu(config: Config) -> Config:
    changes = {"device": "cpu", "liger": "off", "quantize": "none"}
    return config.model_copy(update={"model": config.model.model_copy(update=changes)})


def _save(model: LanguageModel, folder: Path) -> str:
    """Weights, config and processor files; the name of the class that opens them."""
    module = merged(model.module) if model.has_adapter else model.module
    with writing(folder):
        module.save_pretrained(folder)
        for name, content in model.processor_files.items():
            (folder / name).write_bytes(content)
    return type(module).__name__


@torch.no_grad()
def merged(adapted: Any) -> Any:
    """The base model with W + s B A for W, summed in fp32 and rounded once to the dtype of W."""
    for layer in adapted.modules():
        if hasattr(layer, "get_delta_weight") and getattr(layer, "lora_A", None):
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight("default").float())
    return adapted.unload()


def _assemble(base: Path, folder: Path) -> None:
    """The files of a whole checkpoint, with the tensors of `folder`/thinker in the place of its own."""
    trained = {name: file for file in sorted((folder / "thinker").glob("*.safetensors")) for name in _names(file)}
    files = [path for path in sorted(base.rglob("*")) if path.is_file() and ".cache" not in path.parts]
    for file in files:
        target = folder / file.relative_to(base)
        target.parent.mkdir(parents=True, exist_ok=True)
        with writing(target):
            if file.suffix == ".safetensors":
                _replace(file, target, trained)
            elif not target.exists():
                shutil.copyfile(file, target)
    if trained:
        names = ", ".join(sorted(trained)[:3])
        raise InputError("a place in safetensors for every trained tensor", f"none for {names}", file=base)
    shutil.rmtree(folder / "thinker")


def _replace(file: Path, target: Path, trained: dict[str, Path]) -> None:
    """Copy one file of weights with what was trained in it, in the dtype it had there; that is then done with."""
    with safe_open(file, framework="pt") as old:
        tensors = {name: old.get_tensor(name) for name in old.keys()}  # noqa: SIM118 - not a mapping
        about = old.metadata()
    for name, tensor in tensors.items():
        source = trained.pop(name.removeprefix(_PREFIX), None) if name.startswith(_PREFIX) else None
        if source is not None:
            with safe_open(source, framework="pt") as new:
                found = new.get_tensor(name.removeprefix(_PREFIX))
            if found.shape != tensor.shape:
                raise InputError(f"{name} of shape {tuple(tensor.shape)}", f"{tuple(found.shape)}", file=file)
            tensors[name] = found.to(tensor.dtype)
    save_file(tensors, target, about)


def _names(file: Path) -> list[str]:
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _local(path: str) -> Path:
    """The folder of a checkpoint; one from a hub is there already, for the run began from it."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path))


@contextmanager
def _appearing(out: Path) -> Iterator[Path]:
    """A folder beside `out` that becomes `out` when all went well, and is gone otherwise."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError("a new or empty folder", "one with files" if out.is_dir() else "a file", file=out, field="OUT")
    if not out.absolute().parent.is_dir():
        raise InputError("a place in an existing folder", f"no folder {out.absolute().parent}", file=out, field="OUT")
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # left by one that was killed
    with writing(temporary):
        temporary.mkdir()
    try:
        yield temporary
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def run(args: argparse.Namespace) -> None:
    print(export(args.run_dir, args.out, args.full, args.dequantize))


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m opsd.export",
        description="The newest checkpoint of a run as a folder for plain transformers, its adapter merged in.",
        allow_abbrev=False,
    )
    made.add_argument("run_dir", type=Path, help="a run of opsd.train")
    made.add_argument("out", type=Path, help="a new folder")
    made.add_argument("--full", action="store_true", help="put a trained thinker back into its whole Omni checkpoint")
    made.add_argument("--dequantize", action="store_true", help="merge into what a base in four bits stands for")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return guard(run, made, argv)


if __name__ == "__main__":
    sys.exit(main())
