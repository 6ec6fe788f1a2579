"""What of many measurements is told: their middle, and their worst."""

import math
import statistics


def percentile(values, part):
    """The smallest of the values that a ``part`` of them (0.99 of them) do not exceed."""
    return sorted(values)[math.ceil(part * len(values)) - 1]


def tell(info, what, values):
    """A distribution, in milliseconds."""
    info[f"{what}, {len(values)} times: median (ms)"] = round(statistics.median(values), 3)
    info[f"{what}: p99 (ms)"] = round(percentile(values, 0.99), 3)
    info[f"{what}: max (ms)"] = round(max(values), 3)
