"""Rendered prompts kept in host memory: decoding media and mel spectrograms cost more than a small model's step."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

from opsd.data import Example
from opsd.prompts import Prompt, PromptBuilder


class PromptCache:
    """A PromptBuilder that remembers, least recently used first out, up to a budget in bytes.

    A prompt is a function of its row and the config, so a hit is exact.
    """

    def __init__(self, builder: PromptBuilder, budget_mib: int):
        self.builder = builder
        self.budget = budget_mib * 2**20
        self.bytes = 0
        self._kept: OrderedDict[tuple[str, str, int], Prompt] = OrderedDict()

    def student(self, example: Example) -> Prompt:
        return self._get("student", example, self.builder.student)

    def teacher(self, example: Example) -> Prompt:
        return self._get("teacher", example, self.builder.teacher)

    def _get(self, view: str, example: Example, build: Callable[[Example], Prompt]) -> Prompt:
        key = (view, str(example.file), example.line)
        prompt = self._kept.get(key)
        if prompt is None:
            prompt = self._kept[key] = build(example)
            self.bytes += _size(prompt)
            while self.bytes > self.budget:
                self.bytes -= _size(self._kept.popitem(last=False)[1])
        else:
            self._kept.move_to_end(key)
        return prompt


def _size(prompt: Prompt) -> int:
    return sum(t.numel() * t.element_size() for t in prompt.inputs.values())
