"""What `engine.prefix_dtype` costs: a teacher's scores under kept prompts, exact against codes of one byte.

    PYTHONPATH=.:kernels python -m bench.prefix_dtype CONFIG [--rows 24] [--out bench/results/prefix-dtype.json]

CONFIG: of a run with a frozen teacher, such as RUN/config.yaml. The student's responses to the first rows are drawn
once; the teacher scores them from its cache in every representation. KL(exact || codes) is dense, in fp64, per token.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch import Tensor

from bench.results import Row, environment
from opsd.config import Config, load_config
from opsd.data import read_examples
from opsd.engine import response_hidden
from opsd.loading import load_model
from opsd.logits import logits_of
from opsd.model import LanguageModel
from opsd.objectives.distill import distill_loss
from opsd.prefix_store import open_store
from opsd.prompts import Prompt, PromptBuilder
from opsd.responses import Responses
from opsd.rollout import rollout
from opsd.sampling import Sampling
from opsd.teacher import build_teacher, score
from opsd.teacher_cache import TeacherCache

KINDS = ("exact", "int8", "fp8")
_TOKENS = 256  # of which logits are formed at a time


@torch.no_grad()
def measured(config: Config, count: int) -> list[Row]:
    """A row for each representation, over the responses to the first `count` rows."""
    model = load_model(config.model, config.train.seed, engine=config.engine)
    builder = PromptBuilder(model.processor, config.prompts, config.media)
    rows = read_examples(config.data.train, config.data)[:count]
    prompts, views = ([view(row) for row in rows] for view in (builder.student, builder.teacher))
    responses = rollout(model, prompts, Sampling.of(config.rollout), range(count))
    student = response_hidden(model, prompts, responses)
    found, exact = [], None
    for kind in KINDS:
        states, about = _scored(config, model, views, responses, kind)
        exact = states if exact is None else exact
        weights = responses.token_weights / len(responses.lengths)
        _, tokens = distill_loss(student, model.head, states, None, weights, config.objective)
        apart, agree = _apart(model, exact, states)
        found.append(
            {
                "dtype": kind,
                "tokens": len(states),
                "kl_mean": float(apart.mean()),
                "kl_p99": float(apart.quantile(0.99)),
                "kl_max": float(apart.max()),
                "top1_agreement": float(agree.double().mean()),
                "divergence_mean": float(tokens["divergence"].double().mean()),
                **about,
            }
        )
    return found


def _scored(
    config: Config, model: LanguageModel, views: list[Prompt], responses: Responses, kind: str
) -> tuple[Tensor, Row]:
    """The teacher's states of the response tokens (N, D) from prompts kept as `kind`; what the cache says of itself."""
    engine = config.engine.model_copy(update={"prefix_dtype": kind, "teacher_cache": "memory"})
    store = open_store(engine, model.device)
    assert store is not None
    cache = TeacherCache(store)
    states, _ = score(build_teacher(config.teacher, model), model, views, responses, cache=cache)
    record = cache.metrics()
    size = sum(value for name, value in record.items() if name.endswith(("host_bytes", "device_bytes")))
    errors = {name: record[f"teacher_cache_{name}"] for name in ("key_error", "value_error") if kind != "exact"}
    return states, {"mib": size / 2**20, "prefix_tokens": sum(view.length for view in views), **errors}


def _apart(model: LanguageModel, exact: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """KL(exact || other) in nats, and whether the likeliest token is the same, per token."""
    divergences, agree = [], []
    for a, b in zip(exact.split(_TOKENS), other.split(_TOKENS), strict=True):
        p, q = (logits_of(x, model.head).double().log_softmax(-1) for x in (a, b))
        divergences.append((p.exp() * (p - q)).sum(-1))
        agree.append(p.argmax(-1) == q.argmax(-1))
    return torch.cat(divergences), torch.cat(agree)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--rows", type=int, default=24)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    config = load_config(args.config, args.overrides)
    rows = measured(config, args.rows)
    for row in rows:
        print("  ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in row.items()))
    if args.out is not None:
        about = {"config": str(args.config), "rows": args.rows}
        args.out.write_text(json.dumps({**environment(), **about, "found": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
