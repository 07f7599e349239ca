"""The plan of a run: what each phase of a step takes on the device, and the largest passes that fit it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from opsd.config import Config
from opsd.model import LanguageModel
from opsd.plan.names import FEATURES, PREFIXES, PROMPTS, on_device
from opsd.plan.rehearse import Phases, Rehearsal
from opsd.plan.workload import Workload

MARGIN = 0.08  # of the memory, left for what a plan does not see: workspaces of libraries, fragments, the CUDA context
_STEP = 64  # tokens; a budget is a multiple of it
_TRIES = 4
_CLOSE = 0.02  # of the memory: no search for the last of it


@dataclass(frozen=True)
class Plan:
    """Bytes by phase and line for passes of `budget` tokens, on a device with `memory` bytes."""

    phases: Phases
    budget: int
    memory: int
    largest: int | None  # budget that fits; None: not even one response with its prompt does
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
    known: dict[int, Phases] = {}

    def phases(budget: int) -> Phases:
        budget = min(budget, work.tokens)
        if budget not in known:
            all_phases = fixed | rehearsal.passes(budget)
            known[budget] = {name: _with(phase, resting) for name, phase in all_phases.items()}
        return known[budget]

    asked = config.engine.token_budget
    first = asked if isinstance(asked, int) else work.tokens // 4
    largest = _largest(work, lambda budget: _peak(phases(budget)), room(memory), first)
    budget = asked if isinstance(asked, int) else largest or work.smallest
    return Plan(phases(budget), budget, memory, largest, work.tokens)


def _largest(work: Workload, peak_of: Callable[[int], int], limit: int, first: int) -> int | None:
    """The largest budget whose peak is within the limit, to a few percent: peaks lie nearly on a line.

    first: a budget that is of interest anyway. Every peak is a rehearsal, so few of them are asked for.
    """
    known = {budget: peak_of(budget) for budget in (work.tokens, min(max(first, work.smallest), work.tokens))}
    for _ in range(_TRIES):
        fitting = [budget for budget, peak in known.items() if peak <= limit]
        if work.tokens in fitting or any(limit - known[budget] < _CLOSE * limit for budget in fitting):
            break
        guess = _on_line(known, limit) // _STEP * _STEP
        over = min(budget for budget, peak in known.items() if peak > limit)
        guess = max(work.smallest, min(guess, over - 1), *fitting)
        if guess in known:
            break
        known[guess] = peak_of(guess)
    return max((budget for budget, peak in known.items() if peak <= limit), default=None)


def _on_line(known: dict[int, int], limit: int) -> int:
    """Where the line through the two peaks nearest to the limit meets it; 0 for a single one."""
    near = sorted(known, key=lambda budget: abs(known[budget] - limit))[:2]
    if len(near) < 2 or known[near[0]] == known[near[1]]:
        return 0
    (x, y), (z, w) = ((budget, known[budget]) for budget in near)
    return int(x + (limit - y) * (z - x) / (w - y))


def _resting(config: Config, model: LanguageModel, work: Workload, cuda: bool) -> Counter[str]:
    """What the caches will hold on the device once the run has seen all its rows."""
    decoder = model.module.get_decoder().config
    item = 2 if model.mixed else model.head.weight.element_size()
    width = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
    per_token = 2 * decoder.num_hidden_layers * decoder.num_key_value_heads * width * item
    engine, longest, resting = config.engine, work.longest, Counter[str]()
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
