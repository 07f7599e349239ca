"""`python -m opsd.train cfg.yaml --dry-run`: the first prompts as the model reads them, and the memory of a step.

Only config.json of the model is needed. Without a processor prompts are counted in characters; without rows, or
against that, `--prompt-tokens` says how long they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from opsd.collector import collector_off
from opsd.config import Config
from opsd.data import Example, read_examples
from opsd.errors import InputError
from opsd.plan.device import available, parsed
from opsd.plan.longest import longest_of, roughly
from opsd.plan.outline import outline
from opsd.plan.plan import Plan, make_plan
from opsd.plan.table import rendered
from opsd.plan.workload import Longest, Workload
from opsd.prompts import Prompt, PromptBuilder

_SHOWN = 1500  # characters of a prompt


def dry_run(config: Config, memory: str | None = None, prompt_tokens: int | None = None) -> Iterator[str]:
    """What `--dry-run` prints, part by part. Raises InputError for a config or rows that no run could start with."""
    with collector_off():
        yield from _parts(config, memory, prompt_tokens)


def _parts(config: Config, memory: str | None, prompt_tokens: int | None) -> Iterator[str]:
    if not config.engine.share_prefix:
        raise InputError("true: the plain twin is not planned", "false", field="engine.share_prefix")
    rows = read_examples(config.data.train, config.data) if config.data.train is not None else []
    processor, why = _processor(config)
    longest = None
    if rows and processor is not None:
        builder = PromptBuilder(processor, config.prompts, config.media)
        teaches = config.objective.kind == "distill"
        yield _shown("student", builder.student(rows[0]))
        if teaches:
            yield _shown("teacher", builder.teacher(rows[0]))
        longest = longest_of(rows, builder, teaches)
    elif rows:
        yield f"no prompts to show: {why}\n"
    longest = _asked(prompt_tokens, rows, longest)
    cuda = _is_cuda(config, memory)
    yield _about(config, longest, cuda, counted=processor is not None and prompt_tokens is None) + "\n"
    yield rendered(_plan(config, processor, longest, cuda, memory))


def _plan(config: Config, processor: Any, longest: Longest, cuda: bool, memory: str | None) -> Plan:
    device = torch.device("cuda" if cuda else "cpu")
    have = parsed(memory) if memory is not None else available(device)
    model = outline(config.model, config.engine, processor, cuda)
    return make_plan(config, model, Workload.of(config, longest), cuda, have)


def _processor(config: Config) -> tuple[Any, str]:
    """The model's processor, or None and why there is none."""
    from opsd.processing import load_processor, read_processor_files

    try:
        # without a file some of transformers' tokenizers are empty instead of an error
        if Path(config.model.path).is_dir() and not read_processor_files(config.model.path):
            return None, f"{config.model.path} has no file of a tokenizer or processor"
        return load_processor(config.model.path, trust_remote_code=config.model.trust_remote_code), ""
    except Exception as error:  # of whatever library reads it; a run will say it again
        lines = str(error).strip().splitlines() or [type(error).__name__]
        return None, f"{config.model.path} has no tokenizer or processor that loads ({lines[0]})"


def _asked(prompt_tokens: int | None, rows: list[Example], longest: Longest | None) -> Longest:
    if prompt_tokens is not None:
        return Longest(prompt_tokens, prompt_tokens, max(len(rows), 1))
    if longest is not None:
        return longest
    if not rows:
        raise InputError("rows, or --prompt-tokens", "neither", field="data.train")
    return roughly(rows)


def _is_cuda(config: Config, memory: str | None) -> bool:
    """As the config says; where it leaves the choice, --memory stands for a GPU's."""
    if config.model.device == "auto":
        return torch.cuda.is_available() or memory is not None
    return config.model.device.startswith("cuda")


def _shown(view: str, prompt: Prompt) -> str:
    text = prompt.text if len(prompt.text) <= _SHOWN else f"{prompt.text[:_SHOWN]} [...]"
    body = "\n".join(f"  | {line}" for line in text.splitlines())
    return f"the first row as the {view} reads it, {prompt.length} tokens:\n{body}\n"


def _about(config: Config, longest: Longest, cuda: bool, counted: bool) -> str:
    count, rollout = config.train.prompts_per_step, config.rollout
    views = f"{longest.student} tokens"
    if config.objective.kind == "distill":
        views += f" (teacher {longest.teacher})"
    how = "" if counted else ", not counted by a tokenizer"
    media = "; what towers compute with is not in it" if longest.has_media else ""
    budget = config.engine.token_budget
    passes = "the largest passes that fit" if budget == "auto" else f"passes of at most {budget} tokens"
    return (
        f"one step on {'CUDA' if cuda else 'a CPU'}: {count} prompts of {views}{how}, {rollout.group_size} responses of"
        f" {rollout.max_new_tokens} to each, {passes}{media}"
    )
