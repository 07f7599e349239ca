"""The comparisons of the paper, as changes to a config: same data, same budget, one thing taken away."""

from __future__ import annotations

ABLATIONS: dict[str, list[str]] = {
    "no-rationale": ["prompts.privilege=none"],
    "label-only": ["prompts.privilege=label"],
    "sft": ["objective.kind=sft"],
    "reward": ["objective.kind=reward"],
}
