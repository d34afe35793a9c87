"""Intervals and tests, against textbook values and by simulation of what they promise."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from norm_matters.experiments.statistics import compare_pairs, holm, mean_interval

# Additional hours of sleep by two drugs, ten patients (Cushny and Peebles 1905, in Student 1908).
FIRST = [0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0]
SECOND = [1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4]
DRAWS = 10_000


def test_interval_of_students_sleep_data() -> None:
    found = mean_interval(FIRST)
    assert (found.n, found.mean) == (10, pytest.approx(0.75))
    assert found.sd == pytest.approx(1.789010, abs=1e-6)
    assert (found.low, found.high) == (pytest.approx(-0.5297804, abs=1e-6), pytest.approx(2.0297804, abs=1e-6))


def test_paired_comparison_of_students_sleep_data() -> None:
    found = compare_pairs(FIRST, SECOND)
    assert found.difference.mean == pytest.approx(-1.58)
    assert found.difference.low == pytest.approx(-2.4598858, abs=1e-6)
    assert found.difference.high == pytest.approx(-0.7001142, abs=1e-6)
    assert found.p_t == pytest.approx(0.002833, abs=1e-6)
    turned = compare_pairs(SECOND, FIRST)
    assert (turned.difference.low, turned.p_t) == (-found.difference.high, found.p_t)


def test_wilcoxon_knows_all_orders_of_few_pairs() -> None:
    assert compare_pairs([1.0, 2.0, 3.5, 4.5, 6.0], [0.0] * 5).p_wilcoxon == pytest.approx(2 / 2**5)
    # Ranks of the negative differences: 1. Sums of ranks of 0 and 1 have one order each, of 2^4.
    assert compare_pairs([-1.0, 2.0, 3.5, 4.5], [0.0] * 4).p_wilcoxon == pytest.approx(2 * 2 / 2**4)


def test_too_few_values_say_nothing() -> None:
    assert math.isnan(mean_interval([]).mean)
    single = mean_interval([3.0])
    assert single.mean == 3
    assert all(map(math.isnan, (single.sd, single.low, single.high)))
    found = compare_pairs([3.0], [1.0])
    assert found.difference.mean == 2
    assert math.isnan(found.p_t)
    assert math.isnan(found.p_wilcoxon)


def test_equal_differences_have_no_test() -> None:
    assert math.isnan(compare_pairs([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).p_t)
    assert math.isnan(compare_pairs([1.1, 2.1, 3.1], [1.0, 2.0, 3.0]).p_t)  # equal but for rounding
    assert compare_pairs([1.0, 2.0, 3.0], [1.0, 2.0, 3.0]).difference.high == 0


def test_holm_of_a_worked_example() -> None:
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []


@given(st.lists(st.one_of(st.floats(0, 1), st.just(math.nan)), max_size=8))
def test_holm_keeps_the_order_and_never_makes_p_smaller(p_values: list[float]) -> None:
    adjusted = holm(p_values)
    assert [math.isnan(p) for p in adjusted] == [math.isnan(p) for p in p_values]
    pairs = sorted((p, q) for p, q in zip(p_values, adjusted, strict=True) if not math.isnan(p))
    assert all(p <= q <= min(1, p * len(pairs)) + 1e-12 for p, q in pairs)
    assert [q for _, q in pairs] == sorted(q for _, q in pairs)


def test_missing_tests_do_not_count() -> None:
    assert holm([math.nan, 0.01, 0.02])[1:] == holm([0.01, 0.02])


@pytest.mark.parametrize("n", [3, 5])
def test_intervals_cover_as_often_as_they_say(n: int) -> None:
    draws = np.random.default_rng(n).normal(7, 3, (DRAWS, n)).tolist()
    found = [mean_interval(values) for values in draws]
    # Four standard errors of a share of 95% in 10,000.
    assert sum(each.low <= 7 <= each.high for each in found) / DRAWS == pytest.approx(0.95, abs=0.0088)


def test_pairs_cover_and_reject_as_often_as_they_say() -> None:
    draw = np.random.default_rng(0)
    of_seed = draw.normal(0, 5, (DRAWS // 25, 5))  # what both arms share does not matter
    arm, baseline = (of_seed + draw.normal(level, 1, of_seed.shape) for level in (0.3, 0))
    found = [compare_pairs(a, b) for a, b in zip(arm.tolist(), baseline.tolist(), strict=True)]
    covered = sum(each.difference.low <= 0.3 <= each.difference.high for each in found)
    assert covered / len(found) == pytest.approx(0.95, abs=0.0436)
    null = [compare_pairs(a, b).p_t for a, b in zip((arm - 0.3).tolist(), baseline.tolist(), strict=True)]
    assert sum(p < 0.05 for p in null) / len(null) == pytest.approx(0.05, abs=0.0436)


def test_holm_keeps_the_family_wise_error_rate() -> None:
    p_values = np.random.default_rng(1).uniform(size=(DRAWS, 5)).tolist()
    wrong = sum(min(holm(values)) < 0.05 for values in p_values) / DRAWS
    assert wrong == pytest.approx(1 - (1 - 0.01) ** 5, abs=0.009)
