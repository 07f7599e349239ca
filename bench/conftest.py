"""The summary of `pytest --benchmark-only`: one line per case and provider, against the GEMM floor of the same run."""

from collections import defaultdict

import pytest

TITLES = ("provider", "ms", "tokens/s", "% of floor", "max dX error")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    cases = defaultdict(dict)
    for bench in session.benchmarks if session else []:
        if "case" in bench.extra_info and not bench.has_error:
            cases[bench.extra_info["case"]][bench.extra_info["provider"]] = bench
    for case, providers in cases.items():
        terminalreporter.write_sep("-", case)
        floor = providers.get("floor")
        terminalreporter.write_line("".join(f"{title:>16}" for title in TITLES))
        for name, bench in sorted(providers.items(), key=lambda item: item[1].stats.median):
            seconds, info = bench.stats.median, bench.extra_info
            share = f"{100 * floor.stats.median / seconds:.0f}" if floor else "-"
            error = f"{info['error']:.1e}" if "error" in info else "-"
            columns = (name, f"{1e3 * seconds:.1f}", f"{info['tokens'] / seconds:.0f}", share, error)
            terminalreporter.write_line("".join(f"{column:>16}" for column in columns))
