"""`pytest` runs tests/, `pytest --benchmark-only` runs bench/; with `-n` processes, each has its share of the cores."""

import os

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--full", action="store_true", help="bench: the whole shapes S1, S2 and S3 instead of slices")


def pytest_configure(config: pytest.Config) -> None:
    no_paths_given = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if no_paths_given and config.getoption("benchmark_only", default=False):
        config.args = [str(config.rootpath / "bench")]
    if workers := config.getoption("numprocesses", default=None):
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))
