"""Schedules against their formulas, and what they refuse."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.clock import Clock
from norm_matters.regimes.schedules import parse_schedule

CLOCK = Clock(0, steps_per_epoch=10, epochs=20)


def values(spec, steps, start=0, clock=CLOCK):
    schedule = parse_schedule(spec)
    return [schedule.at(clock.at_step(step), start) for step in steps]


def test_cosine_is_half_a_period_to_the_end_of_the_run():
    found = values({"schedule": "cosine", "from": 0.4, "to": 0.1}, range(200))
    assert found == pytest.approx([0.1 + 0.15 * (1 + math.cos(math.pi * step / 200)) for step in range(200)])


def test_linear_over_a_length_counts_from_the_start_of_its_phase_and_stays_at_the_end():
    found = values({"schedule": "linear", "from": 1.0, "to": 0.5, "over": "50st"}, [100, 125, 149, 150, 199], start=100)
    assert found == pytest.approx([1.0, 0.75, 0.51, 0.5, 0.5])


def test_linear_until_a_point_counts_from_the_start_of_the_run():
    found = values({"schedule": "linear", "from": 1.0, "until": "75%"}, [100, 125, 150, 160], start=100)
    assert found == pytest.approx([1.0, 0.5, 0.0, 0.0])


def test_warm_up_rises_evenly_from_above_zero_and_the_rest_follows():
    found = values({"schedule": "cosine", "from": 0.5, "warmup": "4st"}, [0, 1, 2, 3, 4, 102])
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.25])


def test_constant_with_warm_up():
    assert values({"schedule": "constant", "from": 2.0, "warmup": "1st"}, [0, 1, 199]) == [1.0, 2.0, 2.0]


def test_steps_at_given_places():
    spec = {"schedule": "step", "from": 8.0, "factor": 0.5, "at": ["10ep", "75%"]}
    assert values(spec, [0, 99, 100, 149, 150, 199]) == [8.0, 8.0, 4.0, 4.0, 2.0, 2.0]


def test_steps_at_even_distances():
    spec = {"schedule": "step", "from": 1.0, "every": "25%"}
    assert values(spec, [0, 49, 50, 100, 199]) == pytest.approx([1.0, 1.0, 0.1, 0.01, 0.001])


@given(
    shape=st.sampled_from(["constant", "linear", "cosine"]),
    first=st.floats(0, 10),
    warmup=st.sampled_from(["0st", "7st", "3ep", "30%", "100%", "300%"]),
    epochs=st.integers(1, 6),
    start=st.integers(0, 12),
)
@settings(deadline=None, max_examples=60)
def test_a_schedule_stays_between_zero_and_its_first_value(shape, first, warmup, epochs, start):
    schedule = parse_schedule({"schedule": shape, "from": first, "warmup": warmup})
    clock = Clock(0, steps_per_epoch=4, epochs=epochs)
    for step in range(start, clock.total_steps + 3):
        assert 0 <= schedule.at(clock.at_step(step), start) <= first


@pytest.mark.parametrize(
    ("spec", "relative"),
    [
        ({"schedule": "constant", "from": 1}, False),
        ({"schedule": "constant", "from": 1, "warmup": "5%"}, True),
        ({"schedule": "cosine", "from": 1}, True),
        ({"schedule": "cosine", "from": 1, "over": 30}, False),
        ({"schedule": "linear", "from": 1, "until": "50%"}, True),
        ({"schedule": "step", "from": 1, "at": [30, 60]}, False),
        ({"schedule": "step", "from": 1, "at": ["50%"]}, True),
        ({"schedule": "step", "from": 1, "every": "10%"}, True),
    ],
)
def test_relative_tells_whether_the_length_of_the_run_matters(spec, relative):
    schedule = parse_schedule(spec)
    assert schedule.relative is relative
    short, long = Clock(0, 10, 100), Clock(0, 10, 200)
    same = all(schedule.at(short.at_step(step), 0) == schedule.at(long.at_step(step), 0) for step in range(1000))
    assert same is not relative


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ({"schedule": "cosin", "from": 1}, ["cosin", "did you mean 'cosine'"]),
        ({"from": 1}, ["schedule"]),
        ({"schedule": "linear", "from": 1, "two": 0}, ["two", "linear"]),
        ({"schedule": "constant", "from": 1, "to": 0}, ["'to'", "constant"]),
        ({"schedule": "linear"}, ["`from`", "None"]),
        ({"schedule": "linear", "from": "0.1"}, ["`from`", "'0.1'"]),
        ({"schedule": "linear", "from": True}, ["`from`", "True"]),
        ({"schedule": "linear", "from": float("nan")}, ["`from`", "nan"]),
        ({"schedule": "linear", "from": 1, "over": "ten"}, ["ten", "30ep"]),
        ({"schedule": "linear", "from": 1, "over": 5, "until": 9}, ["over", "until"]),
        ({"schedule": "step", "from": 1}, ["every", "at"]),
        ({"schedule": "step", "from": 1, "every": 3, "at": [4]}, ["every", "at"]),
        ({"schedule": "step", "from": 1, "every": 0}, ["every", "0"]),
        ({"schedule": "step", "from": 1, "at": "50%"}, ["at", "list"]),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(spec, words):
    with pytest.raises(ValueError) as caught:
        parse_schedule(spec)
    for word in words:
        assert word in str(caught.value)
