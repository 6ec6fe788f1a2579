"""What benchmarks found, in one form, and the report that is made of it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))
import floors
import report
from floors import Figure, at_least, at_most

BENCHMARKS = Path(floors.__file__).parent
QUESTION = "How fast is it?"
BENCHMARK = '''
"""How fast is nothing? Floor: nothing."""

import pytest
from floors import at_least, at_most, compare, record, record_distribution, record_point, Figure


@pytest.mark.parametrize("size", [1, 1024, 65536])
def test_nothing(benchmark, size):
    speeds = compare(benchmark, lambda: None, lambda: None, against="nothing", rounds=5, work=size, goal=at_least(0))
    record_point(benchmark, series="there", x=size, x_label="bytes", y=speeds, y_label="bytes per second")
    record_distribution(benchmark, series=f"{size} bytes", label="time (s)", values={"vsport": [1, 2], "nothing": [3]})
    record(benchmark, Figure("memory", 96, "lower", unit="KiB", goal=at_most(64)))


def test_absent(benchmark):
    pytest.skip("no such peer here")
'''


class Recorder(SimpleNamespace):
    """The part of pytest-benchmark's fixture that figures go to; ``rounds`` are made as it makes them."""

    def __init__(self, enabled=True):
        super().__init__(enabled=enabled, extra_info={"question": QUESTION})

    def pedantic(self, target, *, args, setup, rounds):
        for _ in range(rounds if self.enabled else 1):
            setup()
            target(*args)


def results(**benchmarks):
    """As pytest-benchmark writes them, of (name, recorder)."""
    found = {
        "benchmarks": [{"name": name, "extra_info": one.extra_info} for name, one in benchmarks.items()],
        "left_out": [{"name": "bench_peer.py::test_it", "reason": "no such peer here"}],
    }
    return json.loads(json.dumps(found))


@pytest.fixture
def found():
    """A ratio whose goal is met, one whose goal is not, one without a goal, a value."""
    speed, memory = Recorder(), Recorder()
    floors.record_ratio(speed, "speed", [9, 8, 7], [10, 10, 10], against="floor", better="higher", goal=at_least(0.8))
    floors.record_ratio(speed, "round trip", [3, 3], [2, 2], against="peer", better="lower", goal=at_most(1))
    floors.record_ratio(speed, "start", [1], [4], against="peer", better="lower")
    floors.record(memory, Figure("memory of an idle device", 96, "lower", unit="KiB", goal=at_most(64)))
    return results(test_write_size=speed, test_idle=memory)


# -- measuring ---------------------------------------------------------------------------------------------------------


def test_contenders_take_turns_and_the_first_round_does_not_count():
    order = []
    found = floors.in_turns(
        Recorder(), 3, peer=lambda: order.append("peer"), floor=lambda: 7, ours=lambda: order.append("ours")
    )
    assert order == ["peer", "ours"] * 4
    assert found["floor"] == [7, 7, 7]
    assert len(found["ours"]) == len(found["peer"]) == 3
    assert all(seconds > 0 for seconds in found["ours"])


def test_without_measuring_each_runs_once():
    order = []
    floors.in_turns(Recorder(enabled=False), 5, peer=lambda: order.append("peer"), ours=lambda: order.append("ours"))
    assert order == ["peer", "ours"]


def test_the_ratio_is_the_median_of_the_turns():
    recorder = Recorder()
    ratio = floors.record_ratio(recorder, "speed", [1, 9, 30], [10, 10, 10], against="floor", better="higher")
    assert ratio == 0.9
    assert recorder.extra_info["figures"] == [
        {
            "what": "speed",
            "value": 0.9,
            "better": "higher",
            "against": "floor",
            "unit": "",
            "goal": None,
            "ratios": [0.1, 0.9, 3.0],
        }
    ]


def test_who_takes_longer_is_slower():
    recorder = Recorder()
    floors.compare(recorder, lambda: sum(range(30000)), lambda: None, against="nothing", rounds=3, work=1)
    assert recorder.extra_info["figures"][0]["value"] < 1


@pytest.mark.parametrize(
    ("goal", "met", "missed"), [(at_least(0.8), [0.8, 1.5], [0.79]), (at_most(1), [1, 0.2], [1.01])]
)
def test_goals(goal, met, missed):
    assert all(goal.met_by(value) for value in met)
    assert not any(goal.met_by(value) for value in missed)


@pytest.mark.parametrize(("part", "value"), [(0.5, 50), (0.99, 99), (1, 100)])
def test_percentiles(part, value):
    assert floors.percentile(list(range(100, 0, -1)), part) == value


# -- telling -----------------------------------------------------------------------------------------------------------


def table_of(text):
    """The cells of each line of a Markdown table, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_table_says_what_met_its_goal(found):
    cells = [row.cells() for one in found["benchmarks"] for row in report.rows(one["name"], one["extra_info"])]
    assert cells == [
        ("write size", "speed", "floor", "0.8", "0.7 to 0.9", "at least 0.8", "yes"),
        ("write size", "round trip", "peer", "1.5", "1.5 to 1.5", "at most 1", "NO"),
        ("write size", "start", "peer", "0.25", "0.25 to 0.25", "lower is better", ""),
        ("idle", "memory of an idle device", "", "96 KiB", "", "at most 64 KiB", "NO"),
    ]
    text = report.text_table(
        [row for one in found["benchmarks"] for row in report.rows(one["name"], one["extra_info"])]
    )
    assert len(text.splitlines()) == 5


def test_the_report_also_tells_what_was_left_out(found):
    text = report.report(found, {})
    assert f"## {QUESTION}" in text
    assert len(table_of(text)) == 4
    assert "- `bench_peer.py::test_it`: no such peer here" in text


def test_the_goals_tell_nothing_about_this_machine(found):
    assert table_of(report.goals_table(found)) == [
        ["write size", "speed", "floor", "at least 0.8", "0.8", "yes"],
        ["write size", "round trip", "peer", "at most 1", "1.5", "no"],
        ["idle", "memory of an idle device", "", "at most 64 KiB", "1.5 of the goal", "no"],
    ]


def test_a_document_gets_new_goals_between_its_marks(found, tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    for _ in range(2):
        report.renew_goals(document, "| new |\n")
        assert document.read_text() == f"before\n{report.BEGIN}\n| new |\n{report.END}\nafter\n"


@pytest.mark.parametrize("text", ["", report.BEGIN, f"{report.END} {report.BEGIN}"])
def test_a_document_without_marks_stays_as_it_is(text, tmp_path):
    document = tmp_path / "performance.md"
    document.write_text(text)
    with pytest.raises(ValueError, match="needs a line"):
        report.renew_goals(document, "| new |\n")
    assert document.read_text() == text


@pytest.mark.parametrize("text", [None, "", "[]", '{"benchmarks'])
def test_what_is_no_result_is_refused_in_a_line(text, tmp_path):
    path = tmp_path / "results.json"
    if text is not None:
        path.write_text(text)
    message = report.main([str(path)])
    assert str(path) in message
    assert "\n" not in message


# -- all of it ---------------------------------------------------------------------------------------------------------


def run_pytest(directory, *options):
    """With a benchmark of its own, and this project's conftest."""
    (directory / "bench_nothing.py").write_text(BENCHMARK)
    (directory / "conftest.py").write_text((BENCHMARKS / "conftest.py").read_text())
    (directory / "pytest.ini").write_text(f"[pytest]\npython_files = bench_*.py\npythonpath = {BENCHMARKS}\n")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *options, str(directory)]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60)


def texts_of(picture):
    """A picture's titles and labels, which matplotlib keeps as comments beside their outlines."""
    return re.findall(r"<!-- (.*?) -->", picture.read_text())


def test_from_a_benchmark_to_its_report(tmp_path):
    written = tmp_path / "results.json"
    done = run_pytest(tmp_path, f"--benchmark-json={written}")
    assert done.returncode == 0, done.stdout
    assert "ratios to peers and floors" in done.stdout
    assert report.main([str(written)]) is None
    text = (tmp_path / "report.md").read_text()
    assert "## How fast is nothing?" in text
    assert len(table_of(text)) == 6
    assert "test_absent`: no such peer here" in text
    pictures = re.findall(r"!\[.*\]\((.*)\)", text)
    assert pictures == ["bytes-per-second-by-bytes.svg", "time--s.svg"]
    for picture in pictures:
        assert ElementTree.parse(tmp_path / picture).getroot().tag.endswith("svg")
    assert {"there", "bytes", "bytes per second", "vsport", "nothing", "64 Ki"} <= set(texts_of(tmp_path / pictures[0]))
    assert {"1 bytes", "65536 bytes", "time (s)", "vsport", "nothing"} <= set(texts_of(tmp_path / pictures[1]))


def test_without_measuring_nothing_is_written(tmp_path):
    written = tmp_path / "results.json"
    done = run_pytest(tmp_path, f"--benchmark-json={written}", "--benchmark-disable", "-ra")
    assert done.returncode == 0, done.stdout
    assert "3 passed, 1 skipped" in done.stdout
    assert "no such peer here" in done.stdout
    assert not written.exists()
