"""The plan of a run: what each phase of a step takes on the device, and the largest passes that fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

from opsd.config import Config
from opsd.model import LanguageModel
from opsd.plan.names import FEATURES, PREFIXES, PROMPTS, on_device
from opsd.plan.rehearse import Phases, Rehearsal
from opsd.plan.workload import Workload

MARGIN = 0.08  # of the memory, left for what a plan does not see: workspaces of libraries, fragments, the CUDA context
_CLEAR = 0.02  # of the memory: a peak that is estimated to be so far above it needs no rehearsal


@dataclass(frozen=True)
class Plan:
    """Bytes by phase and line for passes of `budget` tokens, on a device with `memory` bytes."""

    phases: Phases
    budget: int
    memory: int
    largest: int | None  # pass that fits; None: not even one response with its prompt does
    whole: int  # tokens of the step: no budget beyond it changes anything

    @property
    def peak(self) -> int:
        return _peak(self.phases)

    @property
    def fits(self) -> bool:
        return self.peak <= room(self.memory)


def room(memory: int) -> int:
    """Bytes of the memory that a plan may use."""
    return int((1 - MARGIN) * memory)


def make_plan(config: Config, model: LanguageModel, work: Workload, cuda: bool, memory: int) -> Plan:
    """model: of opsd.plan.outline. With `engine.token_budget: auto` the plan is that of the largest budget."""
    rehearsal = Rehearsal(config, model, work, cuda)
    fixed = rehearsal.fixed()
    resting = _resting(config, model, work, cuda)

    passes = cache(rehearsal.passes)

    def phases(budget: int) -> Phases:
        found = fixed | rehearsal.rollouts(budget) | passes(work.largest_pass(budget))
        return {name: _with(phase, resting) for name, phase in found.items()}

    asked = config.engine.token_budget
    first = work.largest_pass(asked) if isinstance(asked, int) else work.smallest
    largest = _largest(work.passes, lambda tokens: _peak(phases(tokens)), room(memory), first)
    budget = asked if isinstance(asked, int) else largest or work.smallest
    return Plan(phases(budget), budget, memory, largest, work.tokens)


def _largest(sizes: Sequence[int], peak_of: Callable[[int], int], limit: int, first: int) -> int | None:
    """The largest of the sizes, smallest first, whose peak is within the limit; the peaks grow with them.

    first: one that is of interest anyway, whose peak changes what is asked for, not what is found. Every peak is a
    rehearsal, so few of them are asked for: peaks lie nearly on a line, and what it puts clearly above is not tried.
    """
    known = {size: peak_of(size) for size in (sizes[-1], first)}
    while known[sizes[-1]] > limit:
        fitting = max((size for size in sizes if known.get(size, limit + 1) <= limit), default=0)
        over = min(size for size, peak in known.items() if peak > limit)
        between = [size for size in sizes if fitting < size < over and _on_line(known, size) <= (1 + _CLEAR) * limit]
        if not between:
            return fitting or None
        guess = max((size for size in between if _on_line(known, size) <= limit), default=between[0])
        known[guess] = peak_of(guess)
    return sizes[-1]


def _on_line(known: dict[int, int], size: int) -> float:
    """The peak of a size by the line through the two nearest known ones; 0 where there is one alone."""
    near = sorted(known, key=lambda other: abs(other - size))[:2]
    if len(near) < 2:
        return 0.0
    a, b = near
    return known[a] + (size - a) * (known[b] - known[a]) / (b - a)


def _resting(config: Config, model: LanguageModel, work: Workload, cuda: bool) -> Counter[str]:
    """What the caches will hold on the device once the run has seen all its rows."""
    decoder = model.module.get_decoder().config
    item = 2 if model.mixed else model.head.weight.element_size()
    width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    engine, longest, resting = config.engine, work.longest, Counter[str]()
    heads = decoder.num_hidden_layers * decoder.num_key_value_heads
    coded = engine.prefix_dtype != "exact"
    per_token = heads * (2 * width + 4 if coded else 2 * width * item)  # codes, and a scale for a token's values
    if work.views is not None and config.teacher.kind == "frozen" and engine.teacher_cache != "none":
        mib = engine.teacher_cache_device_mib if cuda else engine.teacher_cache_host_mib
        resting[PREFIXES] = min(mib * 2**20, longest.rows * per_token * longest.teacher)
    if longest.has_media:  # at most all of a prompt's tokens are theirs
        features = longest.rows * longest.student * decoder.hidden_size * item
        resting[FEATURES] = min(engine.feature_cache_mib * 2**20, features)
    if not cuda:
        resting[PROMPTS] = min(config.prompts.cache_mib * 2**20, longest.rows * longest.prompt_bytes)
    return resting


def _with(phase: Counter[str], resting: Counter[str]) -> Counter[str]:
    """The phase, and those caches filled."""
    return Counter({name: max(phase[name], resting[name]) for name in {**phase, **resting}})


def _peak(phases: Phases) -> int:
    return max(on_device(phase) for phase in phases.values())
