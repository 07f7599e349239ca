"""The packed engine against its plain twin, `generate` and TRL's SDFTTrainer; columns: bench/README.md.

Two layers of SmolLM2-135M's widths: all of it takes about a minute on two cores. `python -m bench.engine_report` is the
full table. Each case compares values first, then times both sides in turn.
"""

import statistics

import pytest
import torch

from bench.engine_cases import SMOLLM2, TINY, Shape, language_model
from bench.engine_report import STEP, STEP_TARGET, peaks
from bench.engine_step import against_sdft
from bench.engine_tasks import OURS, TASKS, Steps, Task
from bench.measure import timed

LAYERS, ROUNDS = 2, 3
SMALL = [Task(task.name, Shape(40, 30, 10, 4), 0.0, task.peer, task.build) for task in TASKS[1:5]]


@pytest.fixture(scope="module")
def model():
    return language_model(SMOLLM2, LAYERS)


@pytest.mark.parametrize("task", TASKS, ids=str)
def test_smollm2_widths(benchmark, model, task: Task) -> None:
    steps = task.build(model, task.shape)
    steps.gate()
    compare(benchmark, steps, ROUNDS, task=f"{task}, {LAYERS} layers", target=task.target, peer=task.peer)


@pytest.mark.parametrize("task", SMALL, ids=str)
def test_tiny(benchmark, task: Task) -> None:
    steps = task.build(language_model(TINY), task.shape)
    steps.gate()
    compare(benchmark, steps, 9, task=f"tiny {task}", peer=task.peer)


def test_whole_step(benchmark) -> None:
    with against_sdft(SMOLLM2, LAYERS, STEP) as (peer, steps):
        steps.gate()
        memory = peaks({OURS: steps.ours, peer: steps.peer})
        facts = {"task": f"whole step {STEP}, {LAYERS} layers", "target": STEP_TARGET, "peer": peer}
        compare(benchmark, steps, ROUNDS, **facts, **memory)


def compare(benchmark, steps: Steps, rounds: int, **facts: object) -> None:
    """Our step as the benchmark, the peer's timed before each round of it; their ratio goes along."""
    others = []
    benchmark.group = "engine"
    benchmark.pedantic(steps.ours, setup=lambda: others.append(timed(steps.peer)), rounds=rounds)
    if benchmark.stats is not None:  # --benchmark-disable runs one round without a clock
        ratio = statistics.median(others) / benchmark.stats.stats.median
        engine = {**facts, "peer_ms": 1e3 * statistics.median(others), "ratio": ratio}
        benchmark.extra_info.update(engine=engine, threads=torch.get_num_threads())
