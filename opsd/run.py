"""A run: what it trains with and on, and which rows and seeds are a step's. opening.py makes one."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from opsd.config import Config
from opsd.data import Example, order
from opsd.errors import InputError
from opsd.fit import Budget
from opsd.log import Clock, RunDir
from opsd.model import LanguageModel
from opsd.optim import Optimizer
from opsd.progress import Progress
from opsd.prompt_cache import VIEWS, PromptCache
from opsd.rollout import Rollouts
from opsd.served import ServedRollouts
from opsd.stop import Stop
from opsd.teacher import Teacher
from opsd.teacher_cache import TeacherCache
from opsd.world import World


@dataclass
class Run:
    """What a run trains with and on, the folder it writes to, and where it stands."""

    train: list[Example]
    held_out: dict[str, list[Example]]  # "test", "validation"
    prompts: PromptCache
    model: LanguageModel
    rollouts: Rollouts | ServedRollouts
    teacher: Teacher
    teacher_cache: TeacherCache | None
    optimizer: Optimizer
    config: Config
    directory: RunDir
    data: str  # digest of the training rows
    start: int  # steps already done
    logged: int  # the step of the last line in metrics.jsonl
    saved: int  # the step of the last checkpoint
    clock: Clock
    progress: Progress
    world: World
    stop: Stop
    budget: Budget
    replaced: int = 0  # rows of this process and step that others stand for

    def rows(self, step: int) -> list[Example]:
        """This process's rows of the step; those of the next one are prepared meanwhile.

        With `data.on_error` skip the next row of the file that decodes stands for one that does not.
        """
        here, after = self._order(step), self._order(step + 1) if step + 1 < self.config.train.steps else []
        views = VIEWS if self.config.objective.kind == "distill" else VIEWS[:1]
        self.prompts.prepare([self.train[row] for row in [*here, *after]], views)
        used = [self._standing_for(row) for row in here] if self.config.data.on_error == "skip" else here
        self.replaced = sum(row != other for row, other in zip(here, used, strict=True))
        return [self.train[row] for row in used]

    def _order(self, step: int) -> list[int]:
        rows = order(len(self.train), self.config.train.prompts_per_step, step, self.config.train.seed)
        return self.world.share(rows)

    def _standing_for(self, row: int) -> int:
        for other in (*range(row, len(self.train)), *range(row)):
            if self.prompts.damage(self.train[other]) is None:
                return other
        raise InputError("a row whose files decode", "none", file=self.config.data.train)

    def seed(self, step: int, place: int, purpose: str) -> int:
        """A 56-bit seed that is a function of (run seed, step, place, purpose): resuming needs no RNG state.

        place: of a row among all of the step, whoever works on it.
        """
        text = f"{self.config.train.seed}/{step}/{place}/{purpose}"
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
