"""Rendered prompts kept in host memory, and built ahead: decoding and mel spectrograms cost more than a small model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import TypeAlias

import torch
from torch import Tensor

from opsd.byte_lru import ByteLru
from opsd.data import Example
from opsd.errors import InputError, MediumError, raise_all
from opsd.prompts import PER_TOKEN, Prompt, PromptBuilder

log = logging.getLogger("opsd")
Row: TypeAlias = tuple[str, int]  # file and line
VIEWS = ("student", "teacher")


class PromptCache:
    """A PromptBuilder that remembers, least recently used first out, up to a budget in bytes, and may work ahead.

    A prompt is a function of its row and the config: a hit is exact, and so is what another thread has built.
    workers: threads that build the rows of `prepare`; with none every prompt is built when it is asked for.
    """

    def __init__(self, builder: PromptBuilder, budget_mib: int, workers: int = 0):
        self.builder = builder
        self._kept: ByteLru[tuple[str, Row], Prompt] = ByteLru(budget_mib * 2**20, _size)
        self._pool = ThreadPoolExecutor(workers, "media") if workers else None
        self._ahead: dict[Row, Future[dict[str, Prompt]]] = {}
        self._damage: dict[Row, MediumError | None] = {}  # of the rows that were looked at

    def student(self, example: Example) -> Prompt:
        return self._get("student", example)

    def teacher(self, example: Example) -> Prompt:
        return self._get("teacher", example)

    def prepare(self, examples: Sequence[Example], views: Sequence[str]) -> None:
        """Let other threads build these views of the rows that come next, in order; any other row is let go.

        What goes wrong there is raised when the row is asked for.
        """
        if self._pool is None:
            return
        before, self._ahead = self._ahead, {}
        for example in examples:
            row = _row(example)
            missing = [view for view in views if self._kept.get((view, row)) is None]
            if missing and row not in self._ahead:
                known = before.pop(row, None)
                self._ahead[row] = known or self._pool.submit(self._build, example, missing)
        for future in before.values():
            future.cancel()

    def ahead(self, examples: Sequence[Example], views: Sequence[str]) -> Iterator[Example]:
        """The rows, while the next few are prepared."""
        size = 8
        for first in range(0, len(examples), size):
            self.prepare(examples[first : first + 2 * size], views)
            yield from examples[first : first + size]

    def damage(self, example: Example) -> MediumError | None:
        """What is wrong with the files of the row, told in the log the first time; None if they decode."""
        row = _row(example)
        if row not in self._damage:
            try:
                future = self._ahead.get(row)
                future.result() if future is not None else self.builder.decode_media(example)
                error = None
            except MediumError as found:
                error = found
                log.warning("skipped: %s", error)
            except InputError:  # not of a file; raised where the prompt is built
                error = None
            self._damage[row] = error
        return self._damage[row]

    def whole(self, examples: Sequence[Example]) -> list[Example]:
        """The rows whose files decode."""
        return [example for example in examples if self.damage(example) is None]

    def close(self) -> None:
        """Let go of what is prepared; a prompt that is being built is finished, for nobody."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None

    def _get(self, view: str, example: Example) -> Prompt:
        row = _row(example)
        prompt = self._kept.get((view, row))
        if prompt is None:
            future = self._ahead.get(row)
            built = future.result() if future is not None else {}
            prompt = built[view] if view in built else getattr(self.builder, view)(example)
            other = self._kept.get((VIEWS[view == VIEWS[0]], row))
            prompt = prompt if other is None else _sharing(prompt, other)
            self._kept.put((view, row), prompt)
        return prompt

    def _build(self, example: Example, views: Sequence[str]) -> dict[str, Prompt]:
        self.builder.decode_media(example)
        return {view: getattr(self.builder, view)(example) for view in views}


def verify(cache: PromptCache, examples: Sequence[Example], views: Sequence[str], *, skip: bool = False) -> None:
    """Build every prompt once and report all rows that fail: media, length, special tokens, privilege.

    skip: rows with a file that does not decode are told in the log only.
    """
    problems = []
    for example in cache.ahead(examples, views):
        if skip and cache.damage(example) is not None:
            continue
        try:
            for view in views:
                getattr(cache, view)(example)
        except InputError as error:
            problems.append(error)
    raise_all(problems)
    if skip and (left := len(cache.whole(examples))) < len(examples):
        log.warning("skipped rows: %d of %d", len(examples) - left, len(examples))


def _row(example: Example) -> Row:
    return str(example.file), example.line


def _sharing(prompt: Prompt, other: Prompt) -> Prompt:
    """The prompt with the media of the row's other view where they are the same: one copy in memory."""

    def find(name: str, tensor: Tensor) -> Tensor:
        same = name not in PER_TOKEN and name in other.inputs and torch.equal(other.inputs[name], tensor)
        return other.inputs[name] if same else tensor

    return replace(prompt, inputs={name: find(name, tensor) for name, tensor in prompt.inputs.items()})


def _size(prompt: Prompt) -> int:
    return sum(t.nbytes for t in prompt.inputs.values())
