"""The arms of the paper's comparison, as changes to a config: same rows, same steps, another thing to learn from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from opsd.errors import InputError, did_you_mean

_TEACHER = "objective.kind=distill"
_NO_TEACHER = "objective.alpha=0"  # the reward term stands beside distillation, nowhere else


@dataclass(frozen=True)
class Arm:
    name: str  # of its folder, and on the command line
    title: str
    learns_from: str
    words: tuple[str, ...]  # what it changes, as on the command line


ARMS = {
    arm.name: arm
    for arm in (
        Arm("base", "base", "nothing", ("train.steps=0",)),
        Arm("sft", "SFT", "the rows' answers", ("objective.kind=sft", _NO_TEACHER)),
        Arm("grpo", "GRPO", "rewards of its responses", ("objective.kind=reward", _NO_TEACHER)),
        Arm("no-rationale", "OPSD, no rationale", "a teacher that sees no more", (_TEACHER, "prompts.privilege=none")),
        Arm("label-only", "OPSD, label only", "a teacher that sees the label", (_TEACHER, "prompts.privilege=label")),
        Arm("opsd", "OPSD", "a teacher that sees the rationale", (_TEACHER, "prompts.privilege=rationale")),
    )
}
# Sections of the rows, the model and the budget: an arm that had its own would be no comparison.
SHARED = ("data", "media", "model", "rollout", "evaluate", "train")


def split_arms(words: Sequence[str]) -> tuple[list[str], dict[str, list[str]]]:
    """Overrides of every arm, and those that one arm has of its own: `grpo:optim.lr=1e-4`."""
    common: list[str] = []
    own: dict[str, list[str]] = {name: [] for name in ARMS}
    for word in words:
        name, colon, key = word.partition("=")[0].partition(":")
        if not colon:
            common.append(word)
            continue
        if name not in ARMS:
            expected = f"an arm before the colon, one of {', '.join(ARMS)}"
            raise InputError(expected, repr(word), file="command line", hint=did_you_mean(name, ARMS))
        if key.partition(".")[0] in SHARED:
            raise InputError(f"{key} the same for every arm", repr(word), file="command line")
        own[name].append(word.removeprefix(f"{name}:"))
    return common, own
