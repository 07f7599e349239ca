"""`pytest` runs tests/, `pytest --benchmark-only` runs bench/."""

import pytest


def pytest_configure(config: pytest.Config) -> None:
    no_paths_given = config.args_source == pytest.Config.ArgsSource.TESTPATHS
    if no_paths_given and config.getoption("benchmark_only", default=False):
        config.args = [str(config.rootpath / "bench")]
