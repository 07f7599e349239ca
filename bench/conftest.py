"""The summary of `pytest --benchmark-only`: one line per case and provider, against the GEMM floor of the same run."""

from collections import defaultdict

import pytest

TITLES = ("provider", "ms", "tokens/s", "% of floor", "extra MiB", "max dX error")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    session = getattr(config, "_benchmarksession", None)
    cases = defaultdict(dict)
    for bench in session.benchmarks if session else []:
        if "case" in bench.extra_info and not bench.has_error:
            cases[bench.extra_info["case"]][bench.extra_info["provider"]] = bench
    if cases:
        skipped = {report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])}
        for reason in sorted(skipped):
            terminalreporter.write_line(f"absent: {reason.removeprefix('Skipped: ')}")
    for case, providers in cases.items():
        terminalreporter.write_sep("-", case)
        floor = providers.get("floor")
        terminalreporter.write_line("".join(f"{title:>16}" for title in TITLES))
        for name, bench in sorted(providers.items(), key=lambda item: item[1].stats.median):
            seconds, info = bench.stats.median, bench.extra_info
            share = f"{100 * floor.stats.median / seconds:.0f}" if floor else "-"
            error = f"{info['error']:.1e}" if "error" in info else "-"
            extra = f"{info['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in info else "-"
            columns = (name, f"{1e3 * seconds:.1f}", f"{info['tokens'] / seconds:.0f}", share, extra, error)
            terminalreporter.write_line("".join(f"{column:>16}" for column in columns))
    engine = [b for b in session.benchmarks if "engine" in b.extra_info and not b.has_error] if session else []
    if engine:
        terminalreporter.write_sep("-", "engine: times as fast as the peer, the same values")
    for bench in engine:
        found = bench.extra_info["engine"]
        target = f"at least {found['target']}" if "target" in found else ""
        memory = f"memory {found['memory_share']:.2f} of the peer's" if "memory_share" in found else ""
        times = f"{1e3 * bench.stats.median:.1f} ms, {found['peer']} {found['peer_ms']:.1f} ms"
        terminalreporter.write_line(
            f"{found['task']:<48}{found['ratio']:>6.2f}x  {target:<14}{times}  {memory}".rstrip()
        )
