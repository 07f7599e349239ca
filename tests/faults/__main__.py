"""`python -m tests.faults [--kills 50] [--inputs 2000] [--seed 0] [--out FILE.json]`: figures of the fault harness."""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path


def main() -> None:
    made = argparse.ArgumentParser(prog="python -m tests.faults")
    made.add_argument("--kills", type=int, default=50)
    made.add_argument("--inputs", type=int, default=2000, help="malformed files of each kind")
    made.add_argument("--seed", type=int, default=0)
    made.add_argument("--out", type=Path)
    args = made.parse_args()
    result: dict[str, object] = {}
    if args.inputs:
        from tests.faults.malformed import refusals

        result["malformed"] = {kind: refusals(kind, args.inputs) for kind in ("config", "rows")}
    if args.kills:
        result["killed_and_resumed"] = _kills(args.kills, args.seed)
    print(json.dumps(result, indent=1))
    if args.out is not None:
        from opsd.environment import environment

        args.out.write_text(json.dumps(environment() | result, indent=1) + "\n", encoding="utf-8")


def _kills(kills: int, seed: int) -> dict[str, object]:
    import peft  # noqa: F401 - imported here, every fork has it
    from transformers import AutoProcessor, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    from tests.faults.kills import kill_and_resume

    start = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        figures = asdict(kill_and_resume(Path(folder), kills, seed))
    return figures | {"seconds": round(time.monotonic() - start, 1)}


if __name__ == "__main__":
    main()
