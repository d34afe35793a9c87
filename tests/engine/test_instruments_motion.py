"""Weights in motion: exact identities of a scale-invariant network, and the equilibrium that decay brings it to."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.engine.instruments import collect
from norm_matters.engine.instruments.collect import Instruments, measured_steps
from norm_matters.engine.instruments.motion import (
    SgdSettings,
    effective_lr,
    equilibrium_angle,
    five_numbers,
    root_mean_square,
    turning_angle,
)
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.regimes import build_regime


class Directions(nn.Module):
    """Scores that depend on the direction of each weight vector only: exactly scale-invariant, in float64."""

    def __init__(self, values: int, channels: int, *, scale: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(scale * torch.randn(channels, values, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1) @ nn.functional.normalize(self.weight, dim=1, eps=0).T


def state_of(module: nn.Module, steps_per_epoch: int = 1, **settings) -> TrainingState:
    phases = [{"epoch": 0, "optimizer": "SGD", **settings}]
    regime = build_regime(RegimeConfig(phases=phases), default="constant")
    return TrainingState(module, regime, Clock(0, steps_per_epoch, 10**6), device=torch.device("cpu"))


def random_batch(generator: torch.Generator, values: int, channels: int, n: int = 8) -> tuple[Tensor, Tensor]:
    images = torch.randn(n, 1, 1, values, generator=generator, dtype=torch.float64)
    return images, torch.randint(0, channels, (n,), generator=generator)


def train_epoch(state: TrainingState, instruments: Instruments, generator: torch.Generator) -> dict[str, np.ndarray]:
    """Train an epoch on random batches; return what was measured, by instrument (the network has one weight)."""
    channels, values = state.module.weight.shape
    for number in range(1, state.clock.steps_per_epoch + 1):
        images, labels = random_batch(generator, values, channels)
        with instruments.step(number):
            train_step(state, images, labels, options=StepOptions(), meter=Meter(state.device))
    instruments.end_epoch(images)
    return {instrument: value for (instrument, _), value in instruments.values().items()}


def module_of(scale: float = 1.0) -> Directions:
    torch.manual_seed(0)
    # Five channels: their five numbers are all of them.
    return Directions(7, 5, scale=scale)


def gradient_norms(weight: Tensor, seed: int) -> np.ndarray:
    """Of the loss of the first batch of that seed, at these weights, by a network of its own."""
    module = module_of()
    module.weight.data = weight.clone()
    images, labels = random_batch(torch.Generator().manual_seed(seed), 7, 5)
    nn.functional.cross_entropy(module(images), labels).backward()
    return module.weight.grad.norm(dim=1).numpy()


def test_a_step_makes_weights_longer_by_pythagoras_and_turns_them_by_the_effective_step() -> None:
    for seed, lr in enumerate([0.01, 0.3, 50.0]):
        state = state_of(module_of(scale=3.0), lr=lr)
        before = state.module.weight.detach().clone()
        found = train_epoch(state, Instruments(state), torch.Generator().manual_seed(seed))
        lengths, gradients = before.norm(dim=1).numpy(), gradient_norms(before, seed)
        np.testing.assert_allclose(found["weight_norm"], np.hypot(lengths, lr * gradients), rtol=1e-10)
        # At the unit vectors gradients are longer by |w|, and the step that turns them is lr / |w|^2.
        units = gradient_norms(before / before.norm(dim=1, keepdim=True), seed)
        np.testing.assert_allclose(found["angle"], np.sort(np.arctan(lr / lengths**2 * units)), rtol=1e-10)
        whole = before.norm().item()
        assert found["effective_lr"] == pytest.approx(lr / whole**2, rel=1e-10)
        turn = found["effective_lr"] * whole * np.linalg.norm(gradients)
        np.testing.assert_allclose(found["layer_angle"], np.arctan(turn), rtol=1e-10)


@pytest.mark.parametrize("nesterov", [False, True])
def test_weights_and_rates_that_are_scaled_together_turn_alike(nesterov: bool) -> None:
    """A weight 10 times as long at 100 times the rate, and a hundredth of the decay, is the same training."""

    def measured(scale: float) -> list[dict[str, np.ndarray]]:
        decay = 0.01 / scale**2
        state = state_of(module_of(scale), lr=0.2 * scale**2, momentum=0.9, nesterov=nesterov, weight_decay=decay)
        instruments, generator = Instruments(state), torch.Generator().manual_seed(1)
        return [train_epoch(state, instruments, generator) for _ in range(20)]

    for one, ten in zip(measured(1.0), measured(10.0), strict=True):
        for name in ("effective_lr", "angle", "layer_angle", "equilibrium"):
            np.testing.assert_allclose(ten[name], one[name], rtol=1e-10)
        np.testing.assert_allclose(ten["weight_norm"], 10 * one["weight_norm"], rtol=1e-10)


@pytest.mark.parametrize(
    ("steps", "settings"),
    [
        (300, {"momentum": 0.9}),
        (300, {"momentum": 0.9, "nesterov": True}),
        pytest.param(1000, {"momentum": 0.0}, marks=pytest.mark.slow),
        pytest.param(1000, {"momentum": 0.5, "dampening": 0.5}, marks=pytest.mark.slow),
    ],
)
def test_decay_brings_the_angle_to_its_equilibrium_within_one_percent(steps: int, settings, monkeypatch) -> None:
    monkeypatch.setattr(collect, "SAMPLES_PER_EPOCH", steps)
    monkeypatch.setattr(collect, "STEPS_PER_SAMPLE", 1)
    torch.manual_seed(0)
    state = state_of(Directions(64, 64, scale=0.2), steps, lr=0.1, weight_decay=0.02, **settings)
    instruments, generator = Instruments(state), torch.Generator().manual_seed(2)
    # The first epoch goes from the initial weights to the equilibrium.
    found = [train_epoch(state, instruments, generator) for _ in range(2)][1]
    assert found["layer_angle"] == pytest.approx(found["equilibrium"], rel=0.01)
    if set(settings) == {"momentum"}:
        assert found["equilibrium"] == pytest.approx(math.sqrt(2 * 0.1 * 0.02 / (1 + settings["momentum"])), rel=1e-12)


@settings(deadline=None, max_examples=100)
@given(st.floats(1e-8, 3.1), st.floats(1e-3, 1e3), st.floats(-0.9, 3), st.integers(0, 99))
def test_the_angle_is_that_between_the_vectors(angle: float, length: float, growth: float, seed: int) -> None:
    u, v = np.linalg.qr(np.random.default_rng(seed).normal(size=(5, 2)))[0].T
    longer = growth * np.sin(angle)  # by as much as a step that turns by this angle may
    w = length * u
    d = length * ((np.cos(angle) * (1 + longer) - 1) * u + np.sin(angle) * (1 + longer) * v)
    assert turning_angle(*map(np.asarray, (w @ w, w @ d, d @ d))) == pytest.approx(angle, rel=1e-10)


def test_a_vector_without_direction_has_no_angle() -> None:
    w, gone, flipped = np.array([0.0, 2.0, 2.0]), np.array([1.0, -2.0, -6.0]), [math.nan, math.nan, math.pi]
    np.testing.assert_equal(turning_angle(w * w, w * gone, gone * gone), flipped)


def test_formulas_hold_for_sgd_only_and_where_they_have_a_value() -> None:
    sgd = SgdSettings(lr=0.1, momentum=0.9, dampening=0.0, nesterov=False, weight_decay=0.02)
    assert effective_lr(sgd, 4.0) == pytest.approx(0.1 / (0.1 * 4), rel=1e-14)
    assert equilibrium_angle(sgd) == pytest.approx(0.0458831, rel=2e-6)
    assert math.isnan(effective_lr(None, 4.0))
    assert math.isnan(effective_lr(sgd, 0.0))
    assert math.isnan(equilibrium_angle(None))
    assert math.isnan(equilibrium_angle(SgdSettings(0.1, 0.9, 0.0, False, 0.0)))
    endless = SgdSettings(0.1, 1.0, 0.0, False, 0.1)
    assert math.isnan(effective_lr(endless, 1.0))
    assert math.isnan(equilibrium_angle(endless))


def test_means_over_steps_and_numbers_over_channels() -> None:
    np.testing.assert_allclose(root_mean_square(np.array([[3.0, 0.0], [4.0, 0.0]])), [np.sqrt(12.5), 0])
    assert np.isnan(root_mean_square(np.empty((0, 2)))).all()
    np.testing.assert_equal(five_numbers(np.array([4.0, math.nan, 0.0, 1.0, 3.0, 2.0])), [0, 1, 2, 3, 4])
    np.testing.assert_equal(five_numbers(np.array([math.inf, 1.0])), [1, 1, 1, math.inf, math.inf])
    assert np.isnan(five_numbers(np.array([math.nan]))).all()


@pytest.mark.parametrize(("steps", "count"), [(1, 1), (11, 1), (39, 1), (40, 2), (390, 16), (5004, 16)])
def test_measured_steps_are_few_spread_evenly_and_include_the_last(steps: int, count: int) -> None:
    found = sorted(measured_steps(steps))
    assert len(found) == count
    assert found[-1] == steps
    gaps = np.diff([0, *found])
    assert max(gaps) - min(gaps) <= 1
