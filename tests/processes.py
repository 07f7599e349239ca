"""The trainer on several gloo processes, as torchrun starts it, without an interpreter's start for every run."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence

import torch


def train_together(size: int, *commands: Sequence[str]) -> None:
    """`python -m opsd.train ...` for each of the commands, one after the other, on `size` processes."""
    torch.multiprocessing.spawn(_process, (size, commands, [_free_port() for _ in commands]), nprocs=size)


def _process(rank: int, size: int, commands: Sequence[Sequence[str]], ports: Sequence[int]) -> None:
    from opsd.train import main

    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(size), MASTER_ADDR="localhost")
    for command, port in zip(commands, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        status = main(list(command))
        assert status == 0, f"{status}: {command}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])
