"""The constants that make a statistic of the deviations an estimate of sigma.

A calibrated constant is such that the output of Gaussian input has rms 1: with S the standard deviation of n draws
and T the statistic of them, `C(n) = sqrt(E[S^2 / T^2])`. As T / S is independent of S, this is
`sqrt(E[1 / T^2] / E[1 / S^2])`; taking the deviations for independent draws of variance 1 - 1/n leaves

    C(n) = sqrt((n - 3) / (n - 1) * E[1 / T^2]),    T of n independent draws,

and the expectation is computed below to 0.1% (n >= 32), without random numbers.
"""

import math
from collections.abc import Callable
from functools import cache
from statistics import NormalDist
from typing import TypeVar

import numpy as np
import torch

_Function = TypeVar("_Function", bound=Callable[..., float])

# Below this the approximation above is poor: the definition is averaged over fixed draws instead.
_FEW = 32


def constant_to_compiler(function: _Function) -> _Function:
    """Mark a function whose result torch.compile takes for a constant instead of looking through a cache at its code.

    As `torch.compiler.assume_constant_result` does, which imports the whole compiler for it: two seconds.
    """
    function._dynamo_marked_constant = True  # pyright: ignore[reportFunctionMemberAccess]
    return function


def paper_moment_constant(p: float) -> float:
    """The paper's constant for `(mean |d|^p)^(1/p)`: 1 over that number's limit for a standard Gaussian."""
    log_moment = p / 2 * math.log(2) + math.lgamma((p + 1) / 2) - math.log(math.pi) / 2
    return math.exp(-log_moment / p)


def paper_extreme_constant(n: int) -> float:
    """The paper's constant for the largest and for the mean of the k largest of n deviations, whatever k."""
    return (1 + math.sqrt(math.pi * math.log(4))) / (2 * math.sqrt(2 * math.log(n)))


def paper_range_constant(n: int) -> float:
    """The constant of Banner et al. (2018) for the largest less the smallest of n deviations."""
    return 1 / math.sqrt(2 * math.log(n))


@constant_to_compiler
def moment_constant(n: int, p: float) -> float:
    """The calibrated constant for `(mean |d|^p)^(1/p)` of n deviations; its limit for large n is the paper's.

    Args:
        n: values per channel, from 2.
        p: from 1.
    """
    return _moment_constant(n, p)


@constant_to_compiler
def extreme_constant(n: int, k: int) -> float:
    """The calibrated constant for the mean of the k largest of n deviations.

    Args:
        n: values per channel, from 2.
        k: from 1 to n.
    """
    return _extreme_constant(n, k)


@constant_to_compiler
def range_constant(n: int) -> float:
    """The calibrated constant for the largest less the smallest of n deviations.

    Args:
        n: values per channel, from 2.
    """
    return _range_constant(n)


@cache
def _moment_constant(n: int, p: float) -> float:
    """By `E[M^-a] = E[e^(a V)] / Gamma(1 + a)` for M = mean |z|^p and a = 2/p.

    P(V > v) is the Laplace transform of M at e^v, itself the n-th power of one integral.
    """
    if n < _FEW:
        return _constant_of_draws(n, lambda d: (np.abs(d) ** p).mean(1) ** (1 / p))
    z = (np.arange(1000) + 0.5) / 100
    density = np.exp(-(z**2) / 2)
    density /= density.sum()
    # log(e^v / n), from where the transform is 1 to where it is 0, in steps small against 1/a = p/2.
    u = np.arange(-p * math.log(9) - math.log(n) - 12, p * math.log(2) + 3, 0.02 * p)
    deficit = -np.expm1(-np.exp(u[:, None] + p * np.log(z))) @ density
    above = np.exp(n * np.log1p(-np.minimum(deficit, 1 - 1e-15)))
    v = (u[1:] + u[:-1]) / 2 + math.log(n)
    mean_inverse = np.sum(np.exp(2 / p * v) * (above[:-1] - above[1:])) / math.gamma(1 + 2 / p)
    return math.sqrt((n - 3) / (n - 1) * mean_inverse)


@cache
def _extreme_constant(n: int, k: int) -> float:
    """By the expectation over the share of |z| beyond the (k+1)-th largest, which follows Beta(k + 1, n - k).

    Given that share, the k largest are independent draws from the tail, whose moments are known.
    """
    if n < _FEW:
        return _constant_of_draws(n, lambda d: np.sort(np.abs(d), axis=1)[:, n - k :].mean(1))
    if k == n:
        return math.sqrt((n - 3) / (n - 1) * _inverse_square(1.0, k))
    shares, weights = shares_beyond(n, k)
    mean_inverse = float(weights @ [_inverse_square(share, k) for share in shares])
    return math.sqrt((n - 3) / (n - 1) * mean_inverse)


@cache
def _range_constant(n: int) -> float:
    """By `E[1 / R^2]` for the range R of n draws, the same for deviations: exact, as R / S is independent of S."""
    if n < _FEW:
        return _constant_of_draws(n, lambda d: d.max(1) - d.min(1))
    r, below = distribution_of_range(n)
    mean_inverse = float(np.sum(2 / r**3 * below)) * (r[1] - r[0])
    # Beyond the last r the distribution is 1.
    return math.sqrt((n - 3) / n * (mean_inverse + 1 / r[-1] ** 2))


def distribution_of_range(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Numbers r in equal steps from 0 (excluded) up, and how probably n Gaussian draws lie within a range of r.

    The smallest is at x, and the others between x and x + r: an integral over x.
    """
    farthest = math.sqrt(2 * math.log(n)) + 6
    r = np.arange(0.02, 2 * farthest, 0.02)
    x = torch.arange(-farthest, 6, 0.02, dtype=torch.float64)
    outside = torch.special.ndtr(x) + torch.special.ndtr(-x - torch.from_numpy(r)[:, None])
    density = torch.exp(-x.square() / 2) * (0.02 / math.sqrt(2 * math.pi))
    below = n * torch.exp((n - 1) * torch.log1p(-outside.clamp(max=1 - 1e-15))) @ density
    return r, below.clamp(max=1).numpy()


def shares_beyond(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """Values of the share of |z| beyond the (k+1)-th largest of n, which follows Beta(k + 1, n - k), and their weights.

    Args:
        n: values.
        k: from 1 to n - 1.
    """
    a, b = k + 1, n - k
    # Over the log-odds of the share, 10 standard deviations around the most likely value.
    odds = math.log(a / b) + math.sqrt(1 / a + 1 / b) * np.linspace(-10, 10, 200)
    log_share, log_rest = -np.log1p(np.exp(-odds)), -np.log1p(np.exp(odds))
    log_density = a * log_share + b * log_rest
    density = np.exp(log_density - log_density.max())
    return np.exp(log_share), density / density.sum()


def tail_moments(share: float) -> tuple[float, float]:
    """Mean and variance of |z| for a standard Gaussian z, given that it is among that share of the largest |z|."""
    threshold = -NormalDist().inv_cdf(share / 2)
    mean = math.exp(-(threshold**2) / 2) / math.sqrt(2 * math.pi) / (share / 2)
    return mean, 1 + threshold * mean - mean**2


def _inverse_square(share: float, k: int) -> float:
    """`E[1 / T^2]` for the mean T of k standard Gaussians given that each |z| is among that share of the largest.

    An expansion in the relative central moments of T, good because a Gaussian's tail is narrow against its mean.
    """
    threshold = -NormalDist().inv_cdf(share / 2)
    mean, variance = tail_moments(share)
    second = variance / mean**2
    third = (2 * mean**2 - 3 * threshold * mean + threshold**2 - 1) / mean**2
    return (1 + 3 * second / k - 4 * third / k**2 + 15 * (second / k) ** 2) / mean**2


def _constant_of_draws(n: int, statistic: Callable[[np.ndarray], np.ndarray]) -> float:
    """`sqrt(mean(S^2 / T^2))` over 20,000 fixed draws of n values; `statistic` maps d (draws, n) to T (draws,)."""
    z = np.random.default_rng(0).standard_normal((20_000, n))
    d = z - z.mean(1, keepdims=True)
    return math.sqrt(np.mean((d**2).mean(1) / statistic(d) ** 2))
