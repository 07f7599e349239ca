"""An adapter folded into its base: `python -m opsd.merge RUN_DIR --out FOLDER`.

The folder is a model like any other. A cold start with an adapter goes on this way: the distillation that starts from
the folder has the cold-started model for its base, and so for its frozen teacher and the start of its average.

    W <- W + s B A        added in fp32, rounded once to the dtype of W
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch

from opsd.answers import finished_run, load_student
from opsd.cli import guard
from opsd.errors import InputError, writing
from opsd.model import LanguageModel


def run(args: argparse.Namespace) -> None:
    config, newest = finished_run(args.run_dir)
    if config.model.adapter == "none":
        expected, hint = "a run with an adapter", f"{newest} is a model already"
        raise InputError(expected, "one without", file=args.run_dir, field="model.adapter", hint=hint)
    if args.out.exists():
        raise InputError("a folder that does not exist", str(args.out), field="--out")
    on_host = config.model.model_copy(update={"device": "cpu", "liger": "off"})
    model = load_student(config.model_copy(update={"model": on_host}), newest)
    _save(model, merge(model.module), args.out)
    print(f"model: {args.out}")


@torch.no_grad()
def merge(module: Any) -> Any:
    """The base of a PeftModel with its adapter folded in."""
    for layer in module.modules():
        if hasattr(layer, "get_delta_weight") and getattr(layer, "lora_A", None):
            weight = layer.get_base_layer().weight
            weight.copy_(weight.float() + layer.get_delta_weight("default").float())
    return module.unload()


def _save(model: LanguageModel, module: Any, out: Path) -> None:
    """Written beside its place and renamed into it."""
    temporary = out.with_name(f".{out.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    with writing(temporary):
        temporary.mkdir(parents=True)
        module.save_pretrained(temporary)
        for name, content in model.processor_files.items():
            (temporary / name).write_bytes(content)
        os.replace(temporary, out)


def main(argv: list[str] | None = None) -> int:
    made = argparse.ArgumentParser(
        prog="python -m opsd.merge",
        description="The newest checkpoint of a run with an adapter, as a model of its own.",
        allow_abbrev=False,
    )
    made.add_argument("run_dir", type=Path, help="a run of opsd.train with model.adapter: lora")
    made.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the model is written")
    made.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return guard(run, made, argv)


if __name__ == "__main__":
    sys.exit(main())
