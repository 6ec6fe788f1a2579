"""What all benchmarks share: each says what its question is, and what was found is shown; also what was left out."""

import pytest
import report

LEFT_OUT = pytest.StashKey[list[dict[str, str]]]()
"""The benchmarks that did not run, with the reason."""


@pytest.fixture(autouse=True)
def _question(request):
    """The first sentence of a file's docstring is the question that it answers."""
    if "benchmark" in request.fixturenames:
        question = request.module.__doc__.partition("?")[0].replace("\n", " ") + "?"
        request.getfixturevalue("benchmark").extra_info["question"] = question


def pytest_configure(config):
    config.stash[LEFT_OUT] = []


class Watcher:
    """Notes what was skipped, and what failed."""

    def __init__(self, left_out):
        self.left_out = left_out

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            _path, _line, reason = report.longrepr
            self.left_out.append({"name": report.nodeid, "reason": reason.removeprefix("Skipped: ")})
        elif report.failed:
            self.left_out.append({"name": report.nodeid, "reason": "failed"})


def pytest_sessionstart(session):
    session.config.pluginmanager.register(Watcher(session.config.stash[LEFT_OUT]))


def pytest_benchmark_update_json(config, benchmarks, output_json):
    output_json["left_out"] = config.stash[LEFT_OUT]


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, config):
    """The table of the report, after pytest-benchmark's own."""
    session = getattr(config, "_benchmarksession", None)
    rows = [
        row
        for benchmark in getattr(session, "benchmarks", [])
        for row in report.rows(benchmark.name, benchmark.extra_info)
    ]
    if rows:
        terminalreporter.section("ratios to peers and floors: medians of turns in the same run")
        terminalreporter.write(report.text_table(rows))
