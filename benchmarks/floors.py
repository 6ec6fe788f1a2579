"""How a benchmark is compared with its floor: both in turns, in the same process, so that a noisy machine hits both."""

import statistics
import time


def compare(benchmark, ours, floor, *, rounds, bytes_per_round):
    """Times ``ours`` and ``floor`` in turns; the median of the pairs' ratios goes into extra_info.

    pytest-benchmark shows the time of ``ours``, which says little on a shared machine; the ratio is what counts.
    """
    ratios = []

    def pair():
        started = time.perf_counter()
        floor()
        between = time.perf_counter()
        ours()
        ratios.append((between - started) / (time.perf_counter() - between))

    pair()  # warms both up
    ratios.clear()
    benchmark.pedantic(pair, rounds=rounds)
    benchmark.extra_info["bytes"] = bytes_per_round
    benchmark.extra_info["speed as a part of the floor's"] = round(statistics.median(ratios), 3)
