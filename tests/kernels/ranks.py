"""Two gloo processes for the tests that need a group: each runs every named case of a module, in one order."""

import datetime
import importlib
import json
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

RANKS = 2


def run(module: str, directory: Path) -> dict[str, list[str]]:
    """Case of `module.ON_EVERY_RANK` -> what went wrong on each rank, "" where nothing did."""
    torch.multiprocessing.spawn(_rank, (module, directory), nprocs=RANKS)
    ranks = [json.loads((directory / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]
    names = importlib.import_module(module).ON_EVERY_RANK
    return {name: [outcomes.get(name, "an earlier case failed") for outcomes in ranks] for name in names}


def _rank(rank: int, module: str, directory: Path) -> None:
    torch.set_num_threads(1)
    limit = datetime.timedelta(seconds=30)  # of a rank that waits for one that failed
    dist.init_process_group("gloo", f"file://{directory}/store", limit, RANKS, rank)
    outcomes: dict[str, str] = {}
    for name, case in importlib.import_module(module).ON_EVERY_RANK.items():
        try:
            case()
            outcomes[name] = ""
        except Exception:
            outcomes[name] = traceback.format_exc()
            break  # the ranks may no longer agree on what comes next
    (directory / f"{rank}.json").write_text(json.dumps(outcomes), encoding="utf-8")
    if all(not outcome for outcome in outcomes.values()):
        dist.barrier()
        dist.destroy_process_group()
