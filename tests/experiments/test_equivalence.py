"""Ratios, signs, counts and power: against textbook values, against the definition, and by simulation of coverage."""

import math
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy import stats

from norm_matters.core.errors import UserError
from norm_matters.experiments.equivalence import (
    fieller,
    fisher_p,
    one_sided_p,
    seeds_for_power,
    tost_power,
)
from norm_matters.experiments.statistics import mean_interval

# Additional hours of sleep by two drugs, ten patients (Cushny and Peebles 1905, in Student 1908).
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
DRAWS = 2500


def test_one_sided_p_of_students_sleep_data() -> None:
    differences = [b - a for a, b in zip(FIRST, SECOND, strict=True)]
    assert one_sided_p(differences) == pytest.approx(0.002833 / 2, abs=1e-6)
    assert one_sided_p([-value for value in differences]) == pytest.approx(1 - 0.002833 / 2, abs=1e-6)
    assert math.isnan(one_sided_p([1.0]))
    assert one_sided_p([1.0, 1.0]) == 0
    assert one_sided_p([-1.0, -1.0]) == 1


def test_fishers_tea_tasting() -> None:
    assert fisher_p((3, 1), (1, 3)) == pytest.approx(34 / 70)  # the lady tastes three of four cups right
    assert fisher_p((4, 0), (0, 4)) == pytest.approx(2 / 70)


def test_eight_seeds_can_show_divergence_and_three_cannot() -> None:
    assert fisher_p((8, 0), (0, 8)) == pytest.approx(2 / math.comb(16, 8))
    assert fisher_p((3, 0), (0, 3)) == pytest.approx(0.1)


@given(
    st.lists(st.tuples(st.floats(-5, 5), st.floats(0.5, 5)), min_size=3, max_size=8),
    st.floats(0.6, 0.98),
)
def test_fiellers_edges_are_where_the_paired_t_test_turns(pairs: list[tuple[float, float]], confidence: float) -> None:
    a, b = (np.array(values) for values in zip(*pairs, strict=True))
    assume(a.std() > 0.01)
    assume(b.std() > 0.01)
    found = fieller(a.tolist(), b.tolist(), confidence)
    if math.isinf(found.low):
        assert stats.ttest_1samp(b, 0).pvalue >= 1 - confidence - 1e-9
        return
    assert found.low <= found.estimate <= found.high
    for edge in (found.low, found.high):
        rest = a - edge * b
        assume(rest.std() > 1e-6)
        assert stats.ttest_1samp(rest, 0).pvalue == pytest.approx(1 - confidence, rel=1e-4, abs=1e-6)


def test_fieller_of_values_without_spread_is_their_ratio() -> None:
    found = fieller([3.0, 3.0, 3.0], [2.0, 2.0, 2.0])
    assert (found.low, found.estimate, found.high) == pytest.approx((1.5, 1.5, 1.5))


def test_a_denominator_that_may_be_zero_has_no_bounds() -> None:
    found = fieller([1.0, 2.0, 3.0], [-1.0, 0.5, 1.0])
    assert (found.low, found.high) == (-math.inf, math.inf)
    assert math.isnan(fieller([1.0], [2.0]).low)


@pytest.mark.parametrize("seeds", [5, 10])
def test_coverage_of_fieller_and_of_the_paired_t_interval(seeds: int) -> None:
    draw = np.random.default_rng(0)
    truth, hits, t_hits = 0.8, 0, 0
    for _ in range(DRAWS):
        # Three arms with a noise of seeds that they share, as in a recovered share.
        shared, own = draw.normal(0, 0.3, seeds), draw.normal(0, 0.3, (3, seeds))
        low, high, arm = shared + own[0], 1.2 + shared + own[1], truth * 1.2 + shared + own[2]
        found = fieller((arm - low).tolist(), (high - low).tolist(), 0.9)
        hits += found.low <= truth <= found.high
        interval = mean_interval((arm - high).tolist(), 0.9)
        t_hits += interval.low <= (truth - 1) * 1.2 <= interval.high
    tolerance = 4 * math.sqrt(0.9 * 0.1 / DRAWS)
    assert hits / DRAWS == pytest.approx(0.9, abs=tolerance)
    assert t_hits / DRAWS == pytest.approx(0.9, abs=tolerance)


@pytest.mark.parametrize(
    ("sd", "difference", "power"), [(0.3, 0.0, 0.84), (0.3, 0.2, 0.57), (0.3, 0.4, 0.15), (0.5, 0.0, 0.29)]
)
def test_power_of_five_seeds_as_in_the_notes_on_the_paper(sd: float, difference: float, power: float) -> None:
    found = tost_power(5, sd=sd, margin=0.5, difference=difference)
    assert found == pytest.approx(power, abs=0.01)
    draws = np.random.default_rng(1).normal(difference, sd, (100_000, 5))
    half = stats.t.ppf(0.95, 4) * draws.std(1, ddof=1) / math.sqrt(5)
    inside = (draws.mean(1) - half > -0.5) & (draws.mean(1) + half < 0.5)
    assert found == pytest.approx(inside.mean(), abs=0.006)
    assert tost_power(5, sd=sd, margin=0.5, difference=-difference) == pytest.approx(found)


def test_power_at_its_ends() -> None:
    assert tost_power(5, sd=0.0, margin=0.5, difference=0.4) == 1
    assert tost_power(5, sd=0.0, margin=0.5, difference=0.6) == 0
    assert tost_power(50, sd=0.1, margin=0.5, difference=0.5) == pytest.approx(0.05, abs=0.002)  # the test's own level


@pytest.mark.parametrize(("sd", "margin"), [(0.2, 0.5), (0.3, 0.5), (0.3, 0.2), (0.05, 0.5)])
def test_the_number_of_seeds_is_the_least_that_has_the_power(sd: float, margin: float) -> None:
    count = seeds_for_power(sd, margin=margin)
    assert count == 3 or tost_power(count - 1, sd=sd, margin=margin, difference=margin / 2) < 0.8
    assert tost_power(count, sd=sd, margin=margin, difference=margin / 2) >= 0.8


def test_a_spread_beyond_all_means_asks_for_the_most_seeds() -> None:
    assert seeds_for_power(100.0, margin=0.5) == 1000


def test_without_scipy_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.special", None)
    with pytest.raises(UserError, match="SciPy, which is not installed: pip install"):
        mean_interval([1.0, 2.0])
