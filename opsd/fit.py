"""Passes that fit: how many tokens one takes, and what happens where that was too many.

A step that runs out of memory is done once more in passes of half the tokens: its gradients so far are thrown away and
its random state is put back, so what it gives is what the smaller passes would have given from the start. The smaller
budget stays, in RUN/passes.json for a resumed run too, as does what rollouts have at a time once that became less.
"""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from opsd import durable
from opsd.errors import InputError

T = TypeVar("T")
_REFUSALS = ("can't allocate memory", "not enough memory")  # of torch's allocator on a CPU


@dataclass
class Budget:
    """The tokens of a pass, what a rollout has at a time, and how often any of it had to become less."""

    tokens: int
    file: Path  # where a smaller number than the config's is kept
    slots: int = sys.maxsize  # responses that a rollout decodes at a time
    prompt_tokens: int = sys.maxsize  # of its passes over prompts
    retries: int = 0
    writes: bool = True  # False for a process that leaves the file to another

    @staticmethod
    def of(tokens: int, file: Path) -> Budget:
        """The smaller numbers of a file that is there already."""
        known, most = learnt(file), sys.maxsize
        tokens = min(tokens, known.get("token_budget", tokens))
        return Budget(tokens, file, known.get("slots", most), known.get("prompt_tokens", most))

    def halve(self, largest: int) -> None:
        """Half of the largest pass there was, for this and all later steps."""
        self.tokens, self.retries = max(1, min(self.tokens, largest) // 2), self.retries + 1

    def halve_rollouts(self, slots: int, prompt_tokens: int) -> None:
        """Half of what the largest rollout there was had at a time, kept at once."""
        self.slots, self.prompt_tokens = max(1, slots // 2), max(1, prompt_tokens // 2)
        self.retries += 1
        self._write(slots=self.slots, prompt_tokens=self.prompt_tokens)

    def keep(self) -> None:
        self._write(token_budget=self.tokens)

    def _write(self, **numbers: int) -> None:
        if self.writes:
            durable.write_text(self.file, json.dumps(learnt(self.file) | numbers) + "\n")


def learnt(file: Path) -> dict[str, int]:
    """The numbers of a RUN/passes.json, by name; none where there is no such file."""
    if not file.exists():
        return {}
    try:
        known = json.loads(file.read_text(encoding="utf-8"))
        if known and known.keys() <= {"token_budget", "slots", "prompt_tokens"}:
            return {name: int(number) for name, number in known.items()}
        found = json.dumps(known)
    except (ValueError, TypeError, AttributeError) as error:
        found = str(error)
    raise InputError('{"token_budget": N}', found, file=file)


def within_memory(
    attempt: Callable[[], T],
    budget: Budget,
    largest: Callable[[], int],
    start_again: Callable[[], None],
    device: torch.device,
) -> T:
    """attempt(); where it runs out of memory, once more with half the budget.

    largest: tokens of the largest pass under the budget. start_again: undo what the attempt has left behind, or raise.
    Raises InputError where the second attempt fails the same way, or where passes cannot be smaller.
    """

    def smaller() -> str:
        before = largest()
        budget.halve(before)
        if largest() >= before:
            raise _too_little(f"out of memory in a pass of {before} tokens, which cannot be divided")
        start_again()
        budget.keep()
        return f"out of memory in passes of {before} tokens, and of {budget.tokens}"

    return retried(attempt, smaller, device)


def retried(attempt: Callable[[], T], smaller: Callable[[], str], device: torch.device) -> T:
    """attempt(); where it runs out of memory, once more from the same random state.

    smaller: what makes the second attempt one, and tells what will have failed if that fails too.
    """
    state = random_state(device)
    try:
        return attempt()
    except Exception as error:
        if not out_of_memory(error):
            raise
    # outside of the handler: the error's traceback would keep the tensors of the attempt alive
    failed = smaller()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    set_random_state(device, state)
    try:
        return attempt()
    except Exception as error:
        if not out_of_memory(error):
            raise
        raise _too_little(failed) from None


def out_of_memory(error: BaseException) -> bool:
    """Whether an allocator had no more."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(refusal in str(error) for refusal in _REFUSALS)


def random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Of torch's generators for the host and the device."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: tuple[torch.Tensor, torch.Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def _too_little(found: str) -> InputError:
    return InputError("memory for a step", found, field="engine.token_budget", hint="--dry-run shows what takes it")
