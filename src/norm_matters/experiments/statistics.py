"""The statistics of a sweep: intervals of means, paired comparisons over seeds, and many tests at once.

All intervals and tests are Student's: they take the values of an arm (or the differences of pairs) for independent
draws from a normal distribution.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import numpy as np

from norm_matters.core.errors import UserError

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean and what it says about the mean of all possible runs.

    Attributes:
        n: values.
        mean: their mean; NaN without values.
        sd: their standard deviation (of a sample, n - 1); NaN below two values.
        low, high: edges of the confidence interval; NaN below two values.
    """

    n: int
    mean: float
    sd: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Pairs of values, one of an arm and one of the baseline.

    Attributes:
        difference: arm less baseline, its mean over the pairs with its interval.
        p_t: two-sided p value of the paired t test; NaN below two pairs, and where all differences are equal.
        p_wilcoxon: of Wilcoxon's signed-rank test, which assumes symmetry only; NaN where there is nothing to rank.
            With n pairs it is never below 2 / 2^n: 0.25 for three, 0.0625 for five.
    """

    difference: Interval
    p_t: float
    p_wilcoxon: float


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of values with its t interval: mean +- t((1 + confidence) / 2; n - 1) * sd / sqrt(n)."""
    n = len(values)
    if n == 0:
        return Interval(0, math.nan, math.nan, math.nan, math.nan)
    array = np.asarray(values, float)
    mean = float(array.mean())
    if n == 1:
        return Interval(1, mean, math.nan, math.nan, math.nan)
    sd = float(array.std(ddof=1))
    half = float(scipy_special().stdtrit(n - 1, (1 + confidence) / 2)) * sd / math.sqrt(n)
    return Interval(n, mean, sd, mean - half, mean + half)


def compare_pairs(arm: Sequence[float], baseline: Sequence[float], confidence: float = CONFIDENCE) -> Comparison:
    """Compare values that belong together by position (the same seed)."""
    differences = np.asarray(arm, float) - np.asarray(baseline, float)
    interval = mean_interval(differences.tolist(), confidence)
    p_t = p_wilcoxon = math.nan
    # Differences that are equal but for rounding have no spread to test against.
    if interval.sd > 1e-12 * float(np.abs(differences).max(initial=0.0)):
        statistic = interval.mean / (interval.sd / math.sqrt(interval.n))
        p_t = float(2 * scipy_special().stdtr(interval.n - 1, -abs(statistic)))
    if np.any(differences != 0) and len(differences) > 1:
        kept = differences[differences != 0]
        distinct = len(np.unique(np.abs(kept))) == len(kept)
        found: Any = scipy_stats().wilcoxon(kept, method="exact" if distinct and len(kept) <= 50 else "asymptotic")
        p_wilcoxon = float(found.pvalue)
    return Comparison(interval, p_t, p_wilcoxon)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment: all of them below alpha are significant at a family-wise error rate of alpha.

    NaN is no test: it stays, and does not count.
    """
    tested = sorted((index for index, p in enumerate(p_values) if not math.isnan(p)), key=lambda index: p_values[index])
    adjusted = [math.nan] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def scipy_special() -> Any:
    """`scipy.special`, imported at its first use, for that takes a while; UserError where SciPy is not installed."""
    return _scipy("special")


def scipy_stats() -> Any:
    """`scipy.stats`, likewise."""
    return _scipy("stats")


def _scipy(part: str) -> Any:
    try:
        return import_module(f"scipy.{part}")
    except ModuleNotFoundError:
        raise UserError("statistics need SciPy, which is not installed: pip install 'norm-matters[scipy]'") from None
