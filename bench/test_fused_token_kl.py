"""Forward and backward of fused_token_kl against its peers and the head GEMMs alone. Columns: bench/README.md."""

import pytest
import torch

from bench.cases import CASES, FULL_CASES, Case, gradient_error
from bench.measure import peak_extra_bytes
from bench.providers import PROVIDERS, absent, max_error

ROUNDS = 4
ONCE = {"torch rows", "TRL"}  # many times slower than everything else on a CPU: one round tells it


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    metafunc.parametrize("case", FULL_CASES if metafunc.config.getoption("full") else CASES, ids=str)
    metafunc.parametrize("provider", PROVIDERS)


def test_forward_backward(benchmark, case: Case, provider: str) -> None:
    if reason := absent(provider, case):
        pytest.skip(f"{provider}: {reason}")
    step = PROVIDERS[provider](case)
    step()  # warm-up, and correctness first: a fast wrong answer is not timed
    if provider != "floor":
        error = gradient_error(case)
        benchmark.extra_info["error"] = error
        assert error <= max_error(provider, case), f"dX is off by {error:.1e}"
        benchmark.extra_info["extra_bytes"] = peak_extra_bytes(step, case.device)
    benchmark.group = str(case)
    benchmark.extra_info.update(case=str(case), provider=provider, tokens=case.n, threads=torch.get_num_threads())
    benchmark.pedantic(step, rounds=1 if provider in ONCE else ROUNDS)
