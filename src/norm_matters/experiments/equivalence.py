"""Statistics for claims: ratios, signs that turn round, counts of divergence, and how many seeds a claim needs.

The interval of a mean and the paired t test are those of `statistics.py`; what is added here is what they cannot say.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np

from norm_matters.experiments.statistics import mean_interval, scipy_special, scipy_stats

CONFIDENCE = 0.9
"""Of the two-sided interval that decides: two one-sided tests at 5% each."""
ALPHA = (1 - CONFIDENCE) / 2
POWER = 0.8
MOST_ASKED = 1000
"""Seeds; what asks for more asks for more than anybody trains."""
_QUANTILES = 4000  # of the distribution of a standard deviation, for an integral over it


@dataclass(frozen=True)
class Ratio:
    """The ratio of two means with Fieller's interval.

    Attributes:
        estimate: the ratio of the sample means.
        low, high: edges of the interval; infinite on both sides where the denominator may be zero.
    """

    estimate: float
    low: float
    high: float


def fieller(numerator: Sequence[float], denominator: Sequence[float], confidence: float = CONFIDENCE) -> Ratio:
    """The ratio of the means of values that belong together by position, with Fieller's interval.

    All r for which a paired t test does not tell `mean(numerator)` from `r * mean(denominator)`. Fieller 1954, Journal
    of the Royal Statistical Society B 16, 175-185.

    Args:
        numerator, denominator: (n,) each; below two values there is no interval.
    """
    a, b = np.asarray(numerator, float), np.asarray(denominator, float)
    n = len(a)
    estimate = float(a.mean() / b.mean()) if n and b.mean() else math.nan
    if n < 2:
        return Ratio(estimate, math.nan, math.nan)
    t = _quantile(n - 1, (1 + confidence) / 2)
    spread = np.cov(a, b) * (t**2 / n)
    # (mean a - r mean b)^2 <= t^2 var(a - r b) / n, a parabola in r.
    square = b.mean() ** 2 - spread[1, 1]
    middle = a.mean() * b.mean() - spread[0, 1]
    constant = a.mean() ** 2 - spread[0, 0]
    if square <= 0:
        return Ratio(estimate, -math.inf, math.inf)
    root = math.sqrt(max(0.0, middle**2 - square * constant))
    return Ratio(estimate, (middle - root) / square, (middle + root) / square)


def one_sided_p(values: Sequence[float]) -> float:
    """The p value of a t test of the mean against 0, the alternative being that it is greater; NaN below two values."""
    interval = mean_interval(values)
    if interval.n < 2:
        return math.nan
    if interval.sd == 0:
        return 0.0 if interval.mean > 0 else 1.0
    statistic = interval.mean / (interval.sd / math.sqrt(interval.n))
    return float(scipy_special().stdtr(interval.n - 1, -statistic))


def fisher_p(events: tuple[int, int], others: tuple[int, int]) -> float:
    """Two-sided p value of Fisher's exact test that two groups have the same chance of an event.

    Args:
        events: how many in each group.
        others: how many without, in each group.
    """
    return float(scipy_stats().fisher_exact([list(events), list(others)]).pvalue)


@cache
def tost_power(n: int, *, sd: float, margin: float, difference: float = 0.0, alpha: float = ALPHA) -> float:
    """The chance that the interval of a mean of n differences lies within the margin.

    Two one-sided t tests; exact for normal differences: the mean's distribution is integrated over that of the sample
    standard deviation (Phillips 1990, Journal of Pharmacokinetics and Biopharmaceutics 18, 137-144).

    Args:
        n: pairs, from 2.
        sd: standard deviation of the differences.
        margin: above 0, in the unit of `sd`.
        difference: the true one.
        alpha: of each test.
    """
    if sd == 0:
        return float(abs(difference) < margin)
    special = scipy_special()
    shares = (np.arange(_QUANTILES) + 0.5) / _QUANTILES
    deviations = sd * np.sqrt(special.chdtri(n - 1, 1 - shares) / (n - 1))
    error = sd / math.sqrt(n)
    room = margin - _quantile(n - 1, 1 - alpha) * deviations / math.sqrt(n)
    chance = special.ndtr((room - difference) / error) - special.ndtr((-room - difference) / error)
    return float(np.where(room > 0, chance, 0.0).mean())


def seeds_for_power(sd: float, *, margin: float, difference: float | None = None, power: float = POWER) -> int:
    """The least number of seeds with which two arms that differ so much are found to be within the margin.

    Args:
        sd: standard deviation of the paired differences, from a pilot.
        margin: as in `tost_power`.
        difference: the true one; half the margin unless given.
        power: the chance asked for.

    Returns:
        From 3 (below, a deviation is no estimate) to 1,000, which means: more than anybody trains.
    """
    wanted = margin / 2 if difference is None else difference
    low, high = 3, MOST_ASKED
    while low < high:
        middle = (low + high) // 2
        if tost_power(middle, sd=sd, margin=margin, difference=wanted) >= power:
            high = middle
        else:
            low = middle + 1
    return low


def _quantile(freedom: int, share: float) -> float:
    """Of Student's t distribution."""
    return float(scipy_special().stdtrit(freedom, share))
