"""How a benchmark is compared with its peer or its floor, and the one form in which it says what it found.

A *floor* is the same work without us, a *peer* is another program that does what we do. Either runs in turns with ours,
in the same run, so that a noisy machine hits both: what counts is the ratio, and no time is worth anything alone.

What was found goes into ``benchmark.extra_info``, from where ``report.py`` takes it:

``question``
    of the file, from its docstring (``conftest.py`` puts it there).
``figures``
    what was found: a list of Figure, as dictionaries.
``line``
    for a picture: a Point of a line for each contender, as a dictionary.
``samples``
    for a picture: a Distribution for each contender, as a dictionary.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field

OURS = "vsport"
"""The name of what is measured, in pictures."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should be; ``bound`` is a ratio, or is in the figure's unit."""

    sense: str
    """``"at least"`` or ``"at most"``."""
    bound: float

    def met_by(self, value: float) -> bool:
        return value >= self.bound if self.sense == "at least" else value <= self.bound

    def __str__(self) -> str:
        return f"{self.sense} {self.bound:g}"


def at_least(bound: float) -> Goal:
    return Goal("at least", bound)


def at_most(bound: float) -> Goal:
    return Goal("at most", bound)


@dataclass(frozen=True, slots=True)
class Figure:
    """One answer: a ratio ours / theirs, or a value with its unit."""

    what: str
    """What is compared, e.g. ``"speed"``, ``"round trip, p99"``."""
    value: float
    better: str
    """``"higher"`` (speeds) or ``"lower"`` (times, bytes of memory, wake-ups)."""
    against: str | None = None
    """The peer or floor of a ratio; None: ``value`` is in ``unit``."""
    unit: str = ""
    goal: Goal | None = None
    ratios: Sequence[float] = field(default=())
    """Of each turn, in order; ``value`` is their median."""


@dataclass(frozen=True, slots=True)
class Point:
    """Where this benchmark is on the lines of a picture: one line a contender."""

    series: str
    """Which picture of those that have the same axes, e.g. ``"guest to host"``."""
    x: float
    x_label: str
    y: Mapping[str, float]
    """By contender."""
    y_label: str


@dataclass(frozen=True, slots=True)
class Distribution:
    """Every single value that was measured, by contender."""

    series: str
    label: str
    """With the unit, e.g. ``"round trip of one byte (ms)"``."""
    values: Mapping[str, Sequence[float]]


def in_turns(benchmark, rounds: int, **contenders: Callable[[], float | None]) -> dict[str, list[float]]:
    """What each contender returned in each round, or, if that is None, how many seconds it took.

    One of them is called ``ours``: it is last in each round, and pytest-benchmark's own figures are of it. A first
    round, which does not count, warms everything up. With ``--benchmark-disable`` each runs once, and that counts.
    """
    found: dict[str, list[float]] = {name: [] for name in contenders}

    def measure(name):
        started = time.perf_counter()
        value = contenders[name]()
        found[name].append(time.perf_counter() - started if value is None else value)

    def others():
        for name in contenders:
            if name != "ours":
                measure(name)

    if benchmark.enabled:
        others()
        measure("ours")
        for values in found.values():
            values.clear()
    benchmark.pedantic(measure, args=["ours"], setup=others, rounds=rounds)
    return found


def compare(
    benchmark,
    ours: Callable[[], None],
    theirs: Callable[[], None],
    *,
    against: str,
    rounds: int,
    work: float,
    goal: Goal | None = None,
    what: str = "speed",
) -> dict[str, float]:
    """Runs both in turns; the ratio of their speeds goes into extra_info.

    ``work`` is how much each does in a round, in whatever unit (bytes, buffers). Returns the median of work in a second
    of each contender, by name.
    """
    seconds = in_turns(benchmark, rounds, theirs=theirs, ours=ours)
    speeds = {name: [work / each for each in values] for name, values in seconds.items()}
    record_ratio(benchmark, what, speeds["ours"], speeds["theirs"], against=against, better="higher", goal=goal)
    return {OURS: statistics.median(speeds["ours"]), against: statistics.median(speeds["theirs"])}


def record_ratio(
    benchmark,
    what: str,
    ours: Sequence[float],
    theirs: Sequence[float],
    *,
    against: str,
    better: str,
    goal: Goal | None = None,
) -> float:
    """Records, and returns, the median of the ratios ours / theirs, which were measured in turns."""
    ratios = [mine / other for mine, other in zip(ours, theirs, strict=True)]
    ratio = statistics.median(ratios)
    record(benchmark, Figure(what, ratio, better, against, goal=goal, ratios=ratios))
    return ratio


def record(benchmark, figure: Figure) -> None:
    """For what is no ratio of two lists, too: ``Figure("wake-ups in 10 s", 0, "lower", goal=at_most(0))``."""
    benchmark.extra_info.setdefault("figures", []).append(asdict(figure))


def record_point(benchmark, *, series: str, x: float, x_label: str, y: Mapping[str, float], y_label: str) -> None:
    """``y`` is what compare() returns, or the same of something else."""
    benchmark.extra_info["line"] = asdict(Point(series, x, x_label, y, y_label))


def record_distribution(benchmark, *, series: str, label: str, values: Mapping[str, Sequence[float]]) -> None:
    benchmark.extra_info["samples"] = asdict(Distribution(series, label, values))


def percentile(values: Sequence[float], part: float) -> float:
    """The smallest of the values that a ``part`` of them (0.99 of them) do not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]
