"""Shows what the benchmarks are about: the ratios to their floors."""

import pytest


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """One line a benchmark, after pytest-benchmark's own table."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [bench for bench in getattr(session, "benchmarks", []) if bench.extra_info]
    if benchmarks:
        terminalreporter.section("ratios of medians, in turns in the same run")
    for bench in benchmarks:
        for what, value in bench.extra_info.items():
            if what != "bytes":
                terminalreporter.write_line(f"{bench.name:<40} {what}: {value}")
