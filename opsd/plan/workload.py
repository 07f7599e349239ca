"""What the passes of a step will hold at most: prompts as long as the longest, responses of full length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from opsd.config import Config
from opsd.group import Group, split
from opsd.prompts import Prompt
from opsd.responses import Responses


@dataclass(frozen=True)
class Longest:
    """The longest prompts of the data, of each view, in tokens; what the rows bring beside text."""

    student: int  # P
    teacher: int  # P + R
    rows: int
    prompt_bytes: int = 0  # of both views as they are kept
    has_media: bool = False


@dataclass(frozen=True)
class Workload:
    """One step of a config at its largest. Letters: B prompts, G responses to each, T tokens of one.

    Media count as the tokens they become: what their towers compute with is not in a plan.
    """

    prompts: tuple[Prompt, ...]  # B, the student's
    views: tuple[Prompt, ...] | None  # the teacher's; None without a teacher
    per_prompt: int  # G
    length: int  # T
    longest: Longest
    held_out: bool = False  # whether there are evaluations

    @staticmethod
    def of(config: Config, longest: Longest) -> Workload:
        count, kind = config.train.prompts_per_step, config.objective.kind
        return Workload(
            tuple(text_prompt(longest.student) for _ in range(count)),
            tuple(text_prompt(longest.teacher) for _ in range(count)) if kind == "distill" else None,
            1 if kind == "sft" else config.rollout.group_size,
            config.rollout.max_new_tokens,
            longest,
            config.data.test is not None or config.data.validation is not None,
        )

    def group(self) -> Group:
        """The step after its rollout, its tokens on meta."""
        count = len(self.prompts) * self.per_prompt
        tokens = torch.zeros(count, self.length, dtype=torch.long, device="meta")
        owners = tuple(i // self.per_prompt for i in range(count))
        responses = Responses(tokens, (self.length,) * count, owners)
        views = None if self.views is None else list(self.views)
        rows: list[object] = [None] * len(self.prompts)  # nobody asks what they say
        return Group(rows, list(self.prompts), views, responses, [""] * count, {})  # type: ignore[arg-type]

    @property
    def tokens(self) -> int:
        """Of a pass that takes the whole step."""
        return len(self.prompts) * (self._root + self.per_prompt * self.length)

    @property
    def passes(self) -> list[int]:
        """Tokens of the passes there can be: some responses with their prompt, then whole prompts, up to the step."""
        whole = self._root + self.per_prompt * self.length
        some = [self._root + count * self.length for count in range(1, self.per_prompt)]
        return some + [count * whole for count in range(1, len(self.prompts) + 1)]

    def largest_pass(self, budget: int) -> int:
        """Tokens of the largest pass under a budget."""
        return max(part.tokens for part in split(self.group(), budget))

    @property
    def smallest(self) -> int:
        """Tokens of one response with its prompt, which nothing divides."""
        return self._root + self.length

    @property
    def _root(self) -> int:
        return max(prompt.length for prompt in (*self.prompts, *(self.views or ())))


def text_prompt(length: int) -> Prompt:
    """A prompt of so many tokens, whatever they are."""
    ids = torch.zeros(1, length, dtype=torch.long)
    return Prompt({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "")
