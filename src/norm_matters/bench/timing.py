"""Time two or more ways to do the same, fairly: in turns, in one process, both warm, seen from outside."""

import statistics
import time
from collections.abc import Callable, Mapping

REPEATS = 9


def _nothing() -> None:
    """Where a call returns when its work is done, there is nothing to wait for."""


def time_in_turns(
    arms: Mapping[str, Callable[[], object]],
    *,
    repeats: int = REPEATS,
    warm_up: int = 2,
    inner: int = 1,
    synchronise: Callable[[], None] = _nothing,
) -> dict[str, list[float]]:
    """Time each arm once a round, so that what disturbs the machine disturbs all alike.

    Args:
        arms: name -> what to time.
        repeats: rounds that count.
        warm_up: rounds before, that do not.
        inner: calls per measurement, where one is too short for the clock.
        synchronise: waits until the device is done.

    Returns:
        name -> seconds per call in each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(warm_up + repeats):
        for name, call in arms.items():
            synchronise()
            start = time.perf_counter()
            for _ in range(inner):
                call()
            synchronise()
            if turn >= warm_up:
                seconds[name].append((time.perf_counter() - start) / inner)
    return seconds


def speedup(seconds: Mapping[str, list[float]], arm: str, base: str) -> float:
    """How many times as fast as `base` an arm is: the median over the rounds of `time_in_turns`."""
    return statistics.median(b / a for a, b in zip(seconds[arm], seconds[base], strict=True))
