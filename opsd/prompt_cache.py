"""Rendered prompts kept in host memory: decoding media and mel spectrograms cost more than a small model's step."""

from __future__ import annotations

from collections.abc import Callable

from opsd.byte_lru import ByteLru
from opsd.data import Example
from opsd.prompts import Prompt, PromptBuilder


class PromptCache:
    """A PromptBuilder that remembers, least recently used first out, up to a budget in bytes.

    A prompt is a function of its row and the config, so a hit is exact.
    """

    def __init__(self, builder: PromptBuilder, budget_mib: int):
        self.builder = builder
        self._kept: ByteLru[tuple[str, str, int], Prompt] = ByteLru(budget_mib * 2**20, _size)

    def student(self, example: Example) -> Prompt:
        return self._get("student", example, self.builder.student)

    def teacher(self, example: Example) -> Prompt:
        return self._get("teacher", example, self.builder.teacher)

    def _get(self, view: str, example: Example, build: Callable[[Example], Prompt]) -> Prompt:
        key = (view, str(example.file), example.line)
        prompt = self._kept.get(key)
        if prompt is None:
            prompt = build(example)
            self._kept.put(key, prompt)
        return prompt


def _size(prompt: Prompt) -> int:
    return sum(t.nbytes for t in prompt.inputs.values())
