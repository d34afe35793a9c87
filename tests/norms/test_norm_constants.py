"""The constants, by Monte Carlo: the output of Gaussian input has rms 1, averaged over draws."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from norm_matters.norms import create_norm
from norm_matters.norms.constants import (
    constant_to_compiler,
    extreme_constant,
    moment_constant,
    paper_extreme_constant,
    paper_moment_constant,
    paper_range_constant,
    range_constant,
)
from norm_matters.norms.spread import spread_of_draws
from norm_matters.norms.which import statistic_norm

KS = [1, 10, 100]
PS = [1.0, 1.5, 3.0, 8.0]


class Estimate(NamedTuple):
    """The constant that draws suggest, and the standard error of it."""

    constant: float
    error: float


def by_monte_carlo(n: int, draws: int, statistics: dict, seed: int = 1) -> dict[tuple, Estimate]:
    """`sqrt(E[S^2 / T^2])` per statistic T, computed by numpy from the definition."""
    rng, ratios = np.random.default_rng(seed), {key: [] for key in statistics}
    for _ in range(draws):
        z = rng.standard_normal(n)
        d = z - z.mean()
        for key, statistic in statistics.items():
            ratios[key].append(np.mean(d**2) / statistic(d) ** 2)
    roots = {key: math.sqrt(np.mean(values)) for key, values in ratios.items()}
    return {key: Estimate(root, np.std(ratios[key]) / math.sqrt(draws) / 2 / root) for key, root in roots.items()}


def calibrated(n: int, kind: str, value: float) -> float:
    if kind == "range":
        return range_constant(n)
    return extreme_constant(n, int(value)) if kind == "k" else moment_constant(n, value)


def top(k: int):
    return lambda d: np.partition(np.abs(d), len(d) - k)[len(d) - k :].mean()


def moment(p: float):
    return lambda d: np.mean(np.abs(d) ** p) ** (1 / p)


RANGE = {("range", 0): lambda d: d.max() - d.min()}


@pytest.mark.parametrize(("n", "draws"), [(256, 1500), (1024, 600), (131_072, 20)])
def test_calibrated_constants_by_monte_carlo(n, draws):
    """The contract, rms 1 within 1%, up to what so few draws leave open."""
    statistics = {**{("k", k): top(k) for k in KS}, **{("p", p): moment(p) for p in PS}, **RANGE}
    for key, estimate in by_monte_carlo(n, draws, statistics).items():
        assert calibrated(n, *key) == pytest.approx(estimate.constant, rel=0.01, abs=3 * estimate.error), key


@pytest.mark.slow
@pytest.mark.parametrize(("n", "draws"), [(32, 20_000), (256, 10_000), (1024, 6_000), (131_072, 150)])
def test_calibrated_constants_to_two_per_mille(n, draws):
    ks, ps = [k for k in (1, 2, 10, 31, 100, 256) if k <= n], [1.0, 1.5, 2.0, 3.0, 8.0, 30.0]
    statistics = {**{("k", k): top(k) for k in ks}, **{("p", p): moment(p) for p in ps}, **RANGE}
    for key, estimate in by_monte_carlo(n, draws, statistics).items():
        allowed = 0.002 * estimate.constant + 3 * estimate.error
        assert calibrated(n, *key) == pytest.approx(estimate.constant, rel=0, abs=allowed), key


@pytest.mark.parametrize("n", [2, 3, 7, 31])
def test_constants_for_few_values(n):
    statistics = {("k", 1): top(1), ("k", 2): top(2), ("p", 3.0): moment(3.0), **RANGE}
    for key, estimate in by_monte_carlo(n, 3000, statistics).items():
        assert calibrated(n, *key) == pytest.approx(estimate.constant, rel=0.005, abs=3 * estimate.error), key


def test_constants_change_smoothly_where_the_method_changes():
    for k in (1, 5, 20):
        assert extreme_constant(32, k) == pytest.approx(extreme_constant(31, k), rel=0.03)
    for p in (1.0, 3.0, 20.0):
        assert moment_constant(32, p) == pytest.approx(moment_constant(31, p), rel=0.03)
    assert range_constant(32) == pytest.approx(range_constant(31), rel=0.01)


def test_limits_and_closed_forms():
    assert paper_moment_constant(1) == pytest.approx(math.sqrt(math.pi / 2))
    assert paper_moment_constant(2) == pytest.approx(1)
    assert moment_constant(1000, 2.0) == pytest.approx(1, rel=1e-3)
    for p in PS:
        gamma = math.sqrt(math.pi) / (2 ** (p / 2) * math.gamma((p + 1) / 2))
        assert paper_moment_constant(p) == pytest.approx(gamma ** (1 / p))
        assert moment_constant(10**7, p) == pytest.approx(paper_moment_constant(p), rel=1e-3)
    # All of the deviations: their mean; a large p: the largest.
    assert extreme_constant(4096, 4096) == pytest.approx(math.sqrt(math.pi / 2), rel=1e-3)
    assert moment_constant(256, 100.0) == pytest.approx(extreme_constant(256, 1) * 256**0.01, rel=0.01)
    assert paper_extreme_constant(1024) == pytest.approx(0.414539, abs=1e-6)
    # Two values: sigma is half of what is between them. Many: the range is twice the largest.
    assert range_constant(2) == pytest.approx(0.5)
    assert range_constant(10**6) == pytest.approx(extreme_constant(10**6, 1) / 2, rel=0.03)
    assert paper_range_constant(1024) == pytest.approx(0.268580, abs=1e-6)


@pytest.mark.parametrize("spec", ["l1", "linf", "topk:k=10", "topk:k=100", "lp:p=1.5", "lp:p=3", "l2", "range"])
def test_output_of_gaussian_input_has_rms_one(spec):
    """Through the norm itself, 256 channels of 1,024 values: the mean over channels is a mean over draws."""
    x = torch.randn((64, 256, 4, 4), generator=torch.Generator().manual_seed(0))
    rms = create_norm(spec, 256)(x).square().mean((0, 2, 3)).mean().sqrt()
    assert rms.item() == pytest.approx(1, abs=0.01)


def test_the_papers_constant_is_not_calibrated():
    """Output std on Gaussian input: 0.68 to 0.71 for Linf, 0.73 to 0.94 for Top(10)."""
    x = torch.randn((64, 64, 4, 4), generator=torch.Generator().manual_seed(0))
    linf = create_norm("linf:constant=paper", 64)(x).std().item()
    topk = create_norm("topk:k=10,constant=paper", 64)(x).std().item()
    assert 0.68 < linf < 0.715
    assert 0.73 < topk < 0.94
    assert 0.5 < create_norm("range:constant=paper", 64)(x).std().item() < 0.65
    assert create_norm("l1:constant=paper", 64)(x).std().item() == pytest.approx(1, abs=0.01)
    quarter = create_norm("l1:constant=0.3133285343288750", 64)(x).std().item()
    assert quarter == pytest.approx(4, abs=0.05)


@pytest.mark.parametrize("n", [2, 20, 300, 16_000])
@pytest.mark.parametrize(
    "spec", ["l2", "l1", "linf", "topk:k=2", "topk:k=10", "lp:p=3", "lp:p=12", "range", "rms", "mean"]
)
def test_spread_by_monte_carlo(spec, n):
    """The relative standard deviation of the estimate, within 10%, and what so few draws leave open."""
    draws = min(20_000, 6_000_000 // n)
    x = torch.randn((1, draws, n), generator=torch.Generator().manual_seed(1))
    norm = statistic_norm(spec)
    sigma = norm.normalise_batch(x)[2].double().sqrt()
    spread = (sigma.std() / sigma.mean()).item()
    assert norm.spread(n) == pytest.approx(spread, rel=0.1 + 3 / math.sqrt(2 * draws), abs=1e-9)


def test_spread_at_the_papers_batch():
    """6.9% for Linf, 3.0% for Top(10), 0.6% for L1 and L2; formulas agree with fixed draws."""
    expected = {"linf": 0.0694, "topk:k=10": 0.0301, "l1": 0.00597, "l2": 0.00559, "range": 0.0529}
    for spec, spread in expected.items():
        assert statistic_norm(spec).spread(16_000) == pytest.approx(spread, rel=5e-3)
    for spec in ("linf", "topk:k=3", "range", "lp:p=1.5"):
        norm = statistic_norm(spec)
        assert norm.spread(1024) == pytest.approx(spread_of_draws(norm.statistic_for(1024), 1024), rel=0.03), spec


def test_a_compiler_takes_them_for_constants_as_torch_would_mark_them() -> None:
    def ours() -> float:
        return 1.0

    def torchs() -> float:
        return 1.0

    torch.compiler.assume_constant_result(torchs)
    assert vars(constant_to_compiler(ours)) == vars(torchs)
    assert vars(moment_constant).items() >= vars(torchs).items()
