"""How much an estimate of sigma varies from batch to batch: its relative standard deviation on Gaussian input.

By formulas and integrals where they hold, else from fixed draws; none takes numbers from torch's default generator.
"""

import math
from functools import cache

import numpy as np
import torch

from norm_matters.norms.constants import distribution_of_range, shares_beyond, tail_moments
from norm_matters.norms.statistic import Deviations, Statistic

# Below this the formulas for extremes, which take the deviations for independent draws, are poor.
_FEW = 256


def spread_of_draws(statistic: Statistic, n: int) -> float:
    """The spread of any statistic of n values, from fixed draws: within 5% for n up to 40,000.

    Args:
        statistic: works on one rank.
        n: values per channel, from 2.
    """
    draws = min(max(16_000_000 // n, 100), 20_000)
    generator, sigmas = torch.Generator().manual_seed(0), []
    per_part = max(1, 4_000_000 // n)
    for start in range(0, draws, per_part):
        x = torch.randn((1, min(per_part, draws - start), n), generator=generator)
        mean = x.mean((0, 2)) if statistic.centred else torch.zeros(x.shape[1])
        sigmas.append(statistic.measure(Deviations(x, mean, x.dtype, n)).sigma.double())
    sigma = torch.cat(sigmas)
    return float(sigma.std() / sigma.mean())


def moment_spread(n: int, p: float) -> float | None:
    """The spread of `(mean |d|^p)^(1/p)`, linearised; None where p is too large for n values to do that."""
    log_moment, log_double = (
        a / 2 * math.log(2) + math.lgamma((a + 1) / 2) - math.log(math.pi) / 2 for a in (p, 2 * p)
    )
    variance = math.expm1(log_double - 2 * log_moment) / n
    return math.sqrt(variance) / p if variance < 0.01 else None


@cache
def extreme_spread(n: int, k: int) -> float | None:
    """The spread of the mean of the k largest of n deviations, k < n; None for few values."""
    if n < _FEW:
        return None
    shares, weights = shares_beyond(n, k)
    means, variances = np.transpose([tail_moments(share) for share in shares])
    mean = weights @ means
    variance = weights @ (variances / k + (means - mean) ** 2)
    return math.sqrt(variance) / float(mean)


@cache
def range_spread(n: int) -> float:
    """The spread of the largest less the smallest of n values, n from 2."""
    r, below = distribution_of_range(n)
    step = r[1] - r[0]
    # At r = 0 no draws lie within; an end of the integral counts half.
    mean, square = (0.5 + np.sum(1 - below)) * step, np.sum(2 * r * (1 - below)) * step
    return math.sqrt(square / mean**2 - 1)
