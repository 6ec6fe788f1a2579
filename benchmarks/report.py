"""Makes a report of what the benchmarks found: tables in Markdown, and pictures.

    pytest benchmarks --benchmark-json=results.json
    python benchmarks/report.py results.json

The report and its pictures are written beside the file. With ``--goals FILE`` the table of goals in FILE, between two
marks, is replaced by what was found.
"""

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import wrap
from typing import Any

from floors import OURS, Figure, Goal

BEGIN, END = "<!-- goals: begin -->", "<!-- goals: end -->"
COLUMNS = ("benchmark", "what", "against", "ratio", "half of turns", "goal", "met")
COLOURS = ("#d95f02", "#7570b3", "#1b9e77", "#e7298a", "#e6ab02", "#666666")
"""For peers and floors, in order of appearance; legible for the colour-blind."""
OUR_COLOUR = "#1f4e9c"


@dataclass(frozen=True, slots=True)
class Row:
    """One line of a table."""

    benchmark: str
    figure: Figure

    @property
    def met(self) -> bool | None:
        """None: there is no goal."""
        goal = self.figure.goal
        return None if goal is None else goal.met_by(self.figure.value)

    @property
    def value(self) -> str:
        return f"{self.figure.value:.3g}" + (f" {self.figure.unit}" if self.figure.unit else "")

    def cells(self) -> tuple[str, ...]:
        figure = self.figure
        ratios = figure.ratios
        spread = _middle_half(ratios) if len(ratios) > 1 else ""
        goal = f"{figure.goal} {figure.unit}".rstrip() if figure.goal else f"{figure.better} is better"
        met = {None: "", True: "yes", False: "NO"}[self.met]
        return (self.benchmark, figure.what, figure.against or "", self.value, spread, goal, met)


def _middle_half(ratios: Sequence[float]) -> str:
    first, _, third = statistics.quantiles(ratios, n=4, method="inclusive")
    return f"{first:.3g} to {third:.3g}"


def rows(name: str, extra_info: Mapping[str, Any]) -> list[Row]:
    """What one benchmark found; ``name`` is the test's."""
    short = name.removeprefix("test_").replace("_", " ")
    return [Row(short, figure_of(found)) for found in extra_info.get("figures", [])]


def figure_of(found: Mapping[str, Any]) -> Figure:
    goal = found["goal"]
    return Figure(**{**found, "goal": goal and Goal(**goal)})


# -- tables ------------------------------------------------------------------------------------------------------------


def text_table(found: Sequence[Row]) -> str:
    lines = [COLUMNS, *(row.cells() for row in found)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(COLUMNS))]
    return "".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() + "\n" for line in lines
    )


def markdown_table(head: Sequence[str], body: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(cell.replace('|', '/') for cell in line)} |\n" for line in lines)


def goals_table(results: Mapping[str, Any]) -> str:
    """Every goal with what was found, without a word about this machine: values are shown as a part of their goal."""
    body = []
    for benchmark in results["benchmarks"]:
        for row in rows(benchmark["name"], benchmark["extra_info"]):
            figure = row.figure
            if figure.goal is None:
                continue
            goal = f"{figure.goal} {figure.unit}".rstrip()
            found = row.value if figure.against else _part_of_goal(figure)
            body.append([row.benchmark, figure.what, figure.against or "", goal, found, "yes" if row.met else "no"])
    return markdown_table(("benchmark", "what", "against", "goal", "found", "met"), body)


def _part_of_goal(figure: Figure) -> str:
    if not figure.goal.bound:
        return f"{figure.value:g}"
    return f"{figure.value / figure.goal.bound:.2g} of the goal"


# -- pictures ----------------------------------------------------------------------------------------------------------


def pictures(results: Mapping[str, Any], directory: Path) -> dict[str, list[str]]:
    """Draws them all as SVG; the names of the files by question."""
    lines, samples = defaultdict(list), defaultdict(list)
    for benchmark in results["benchmarks"]:
        found = benchmark["extra_info"]
        if "line" in found:
            point = found["line"]
            lines[found["question"], point["x_label"], point["y_label"]].append(point)
        if "samples" in found:
            samples[found["question"], found["samples"]["label"]].append(found["samples"])
    drawn = defaultdict(list)
    for (question, x_label, y_label), points in lines.items():
        drawn[question].append(_save(draw_lines(points, x_label, y_label), directory, f"{y_label} by {x_label}"))
    for (question, label), distributions in samples.items():
        drawn[question].append(_save(draw_distributions(distributions, label), directory, label))
    return drawn


def _save(figure, directory: Path, title: str) -> str:
    name = "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-") + ".svg"
    figure.savefig(directory / name)
    return name


def _panels(count: int, **shared):
    """A picture with ``count`` panels, two in a row, and the panels."""
    from matplotlib.figure import Figure as Picture

    columns, rows = min(count, 2), -(-count // 2)
    picture = Picture(figsize=(4.5 * columns + 1, 3.5 * rows), layout="constrained")
    all_axes = picture.subplots(rows, columns, squeeze=False, **shared).flat
    for unused in all_axes[count:]:
        unused.remove()
    return picture, all_axes[:count]


class _Colours(dict):
    """The same contender has the same colour in every panel of a picture."""

    def __missing__(self, contender: str) -> str:
        peers = sum(name != OURS for name in self)
        self[contender] = OUR_COLOUR if contender == OURS else COLOURS[peers % len(COLOURS)]
        return self[contender]


def draw_lines(points: Sequence[Mapping[str, Any]], x_label: str, y_label: str):
    """One panel a series, one line a contender; x and y are logarithmic."""
    panels = defaultdict(list)
    for point in points:
        panels[point["series"]].append(point)
    picture, all_axes = _panels(len(panels), sharex=True, sharey=True)
    colours = _Colours()
    for axes, (series, members) in zip(all_axes, panels.items(), strict=True):
        members.sort(key=lambda point: point["x"])
        for contender in dict.fromkeys(name for point in members for name in point["y"]):
            along = [(point["x"], point["y"][contender]) for point in members if contender in point["y"]]
            axes.plot(*zip(*along, strict=True), "o-", color=colours[contender], label=contender)
        _dress(axes, series, x_label)
        ticks = sorted({point["x"] for point in points})
        axes.set_xscale("symlog" if ticks[0] == 0 else "log", base=2, **({"linthresh": 1} if ticks[0] == 0 else {}))
        axes.set_xticks(ticks, [_short(tick) for tick in ticks])
        axes.tick_params(labelbottom=True)  # also where another panel of the row has one below it
        axes.minorticks_off()
    _scale_y(all_axes[0], [value for point in points for value in point["y"].values()])
    for axes in all_axes[::2]:
        axes.set_ylabel(y_label)
    return picture


def _scale_y(axes, values: Sequence[float]) -> None:
    """Logarithmic if the values are far apart; otherwise from zero on, so that a picture does not exaggerate."""
    from matplotlib.ticker import EngFormatter

    if min(values) > 0 and max(values) > 20 * min(values):
        axes.set_yscale("log")
    else:
        axes.set_ylim(bottom=0)
    if max(values) >= 10**6:
        axes.yaxis.set_major_formatter(EngFormatter())


def draw_distributions(distributions: Sequence[Mapping[str, Any]], label: str):
    """What part of the values was at most so large: one panel a series, one line a contender."""
    from matplotlib.ticker import LogLocator

    picture, all_axes = _panels(len(distributions), sharey=True)
    colours = _Colours()
    for axes, distribution in zip(all_axes, distributions, strict=True):
        for contender, values in distribution["values"].items():
            axes.ecdf(values, color=colours[contender], label=contender)
        _dress(axes, distribution["series"], label)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter("{x:g}")
        axes.xaxis.set_minor_formatter("")
    for axes in all_axes[::2]:
        axes.set_ylabel("part of the values")
    return picture


def _dress(axes, title: str, x_label: str) -> None:
    axes.set_title("\n".join(wrap(title, 40)))
    axes.set_xlabel(x_label)
    axes.grid(alpha=0.3)
    axes.legend(frameon=True, framealpha=0.8, edgecolor="none", fontsize="small")


def _short(number: float) -> str:
    """65536 is 64 Ki."""
    for unit, size in (("Mi", 1 << 20), ("Ki", 1 << 10)):
        if number >= size and number % size == 0:
            return f"{number // size:g} {unit}"
    return f"{number:g}"


# -- the report --------------------------------------------------------------------------------------------------------


def report(results: Mapping[str, Any], drawn: Mapping[str, Sequence[str]]) -> str:
    """The whole of it, in Markdown."""
    parts = [
        "# What the benchmarks found\n",
        "A ratio is ours / theirs, the median of turns in the same run; half of the turns are in the range beside.\n",
    ]
    questions = defaultdict(list)
    for benchmark in results["benchmarks"]:
        found = benchmark["extra_info"]
        questions[found["question"]] += rows(benchmark["name"], found)
    for question, found in questions.items():
        parts.append(f"## {question}\n")
        parts.append(markdown_table(COLUMNS, (row.cells() for row in found)))
        parts += [f"![{Path(name).stem.replace('-', ' ')}]({name})\n" for name in drawn.get(question, ())]
    if left_out := results.get("left_out"):
        parts.append("## Left out\n")
        parts.append("".join(f"- `{one['name']}`: {one['reason']}\n" for one in left_out))
    return "\n".join(parts)


def renew_goals(path: Path, table: str) -> None:
    """Puts ``table`` between the marks of a document; raises ValueError if they are not there."""
    before, begin, rest = path.read_text().partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise ValueError(f"{path} needs a line {BEGIN} and, after it, a line {END}")
    path.write_text(f"{before}{BEGIN}\n{table}{END}{after}")


def load(path: Path) -> dict[str, Any]:
    """Raises OSError, and ValueError if pytest-benchmark has not written it."""
    try:
        results = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(results, dict) or "benchmarks" not in results:
        raise ValueError(f"{path} is not what pytest --benchmark-json writes")
    return results


def main(arguments: Sequence[str] | None = None) -> str | None:
    """Returns what is wrong, for sys.exit()."""
    parser = argparse.ArgumentParser(description="Makes a report of what the benchmarks found.")
    parser.add_argument("results", type=Path, help="what pytest --benchmark-json has written")
    parser.add_argument("--goals", type=Path, metavar="FILE", help="a document whose table of goals is replaced")
    options = parser.parse_args(arguments)
    try:
        results = load(options.results)
        written = options.results.with_name("report.md")
        written.write_text(report(results, pictures(results, options.results.parent)))
        if options.goals:
            renew_goals(options.goals, goals_table(results))
    except OSError as error:
        return f"report: {error.filename}: {error.strerror}"
    except ValueError as error:
        return f"report: {error}"
    print(f"the report is in {written}")
    return None


if __name__ == "__main__":
    sys.exit(main())
