"""Time as a value; random numbers as functions of names and counters."""

import random
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.clock import Clock, Duration
from norm_matters.core.seeding import derive_seed, generator, seed_everything, uniform


def test_clock() -> None:
    clock = Clock(25, steps_per_epoch=10, epochs=4, batch_size=32)
    assert (clock.epoch, clock.total_steps, clock.samples) == (2, 40, 800)
    assert clock.at_step(30) == Clock(30, 10, 4, 32)
    assert clock.at_step(30).epoch == 3


@pytest.mark.parametrize(
    ("value", "amount", "unit"),
    [
        ("30ep", 30, "ep"),
        ("500st", 500, "st"),
        ("12.5%", Fraction(25, 2), "%"),
        (3, 3, "ep"),
        (" 7 ep ", 7, "ep"),
        (0.1, Fraction(1, 10), "ep"),
    ],
)
def test_durations_are_exact(value: object, amount: Fraction | int, unit: str) -> None:
    duration = Duration.parse(value)  # type: ignore[arg-type]
    assert (duration.amount, duration.unit) == (amount, unit)
    assert Duration.parse(duration) is duration
    assert Duration.parse(str(duration)) == duration


@pytest.mark.parametrize("value", ["", "ep", "-1ep", "5 weeks", "1e3", "10%%", "nan", None, True])
def test_what_is_no_duration(value: object) -> None:
    with pytest.raises(ValueError, match="is no duration; write 30ep"):
        Duration.parse(value)  # type: ignore[arg-type]


@settings(deadline=None, max_examples=50)
@given(st.integers(0, 100), st.integers(1, 500), st.integers(1, 300))
def test_percent_of_a_run(percent: int, steps: int, epochs: int) -> None:
    clock = Clock(0, steps, epochs)
    assert Duration.parse(f"{percent}%").steps(clock) == round(Fraction(percent * steps * epochs, 100))
    assert Duration.parse("100%").steps(clock) == Duration.parse(f"{epochs}ep").steps(clock) == clock.total_steps
    assert Duration.parse(f"{percent}st").steps(clock) == percent


def test_seeds_depend_on_every_part_and_on_their_borders() -> None:
    seeds = {derive_seed(*parts) for parts in [(0,), (1,), (0, "order"), ("order", 0), (0, "order", 1), (0, "order1")]}
    assert len(seeds) == 6
    assert all(0 <= seed < 2**63 for seed in seeds)
    # A fixed value: another one would change every result that was ever recorded.
    assert derive_seed(0, "order", 1) == 3818025765772773313


def test_generators_are_their_own() -> None:
    state = torch.get_rng_state()
    first = torch.rand(3, generator=generator(0, "a"))
    assert torch.equal(first, torch.rand(3, generator=generator(0, "a")))
    assert not torch.equal(first, torch.rand(3, generator=generator(0, "b")))
    assert torch.equal(torch.get_rng_state(), state)


def test_seed_everything_sets_three_streams() -> None:
    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.rand()), float(torch.rand(()))

    seed_everything(5)
    first = draw()
    seed_everything(5)
    assert draw() == first
    seed_everything(6)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_uniform_draws_do_not_depend_on_the_batch() -> None:
    together = uniform(seed=1, epoch=2, indices=np.arange(1000), stream=0)
    alone = np.array([uniform(seed=1, epoch=2, indices=np.array([i]), stream=0)[0] for i in range(0, 1000, 97)])
    assert np.array_equal(together[::97], alone)


def test_uniform_draws_are_uniform_and_differ_by_seed_epoch_and_stream() -> None:
    indices = np.arange(100_000)
    draws = [
        uniform(seed=seed, epoch=epoch, indices=indices, stream=stream)
        for seed, epoch, stream in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]
    ]
    for draw in draws:
        assert draw.min() >= 0
        assert draw.max() < 1
        counts = np.histogram(draw, bins=20, range=(0, 1))[0]
        # 19 degrees of freedom: 50 is exceeded once in 7,000 draws, and these are fixed.
        assert ((counts - 5000) ** 2 / 5000).sum() < 50
        assert abs(np.corrcoef(draw[:-1], draw[1:])[0, 1]) < 0.015
    for i, first in enumerate(draws):
        for second in draws[i + 1 :]:
            assert abs(np.corrcoef(first, second)[0, 1]) < 0.015
