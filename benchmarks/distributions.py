"""What of many measurements of a time is told: their middle, and their worst."""

import statistics

from floors import Figure, at_most, percentile, record


def tell(benchmark, what, values, *, p99_at_most=None):
    """A distribution, in milliseconds."""
    goal = None if p99_at_most is None else at_most(p99_at_most)
    record(benchmark, Figure(f"{what}, median of {len(values)}", statistics.median(values), "lower", unit="ms"))
    record(benchmark, Figure(f"{what}, p99", percentile(values, 0.99), "lower", unit="ms", goal=goal))
    record(benchmark, Figure(f"{what}, longest", max(values), "lower", unit="ms"))
