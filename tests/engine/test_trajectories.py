"""The same results from every backend: steps from states of one trajectory, long ones in float64, golden curves."""

import csv
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.models import MODELS
from norm_matters.norms import norm_factory
from norm_matters.norms.kernels import dispatch, reference

GOLDEN = Path(__file__).parents[1] / "golden" / "curves.csv"
SPECS = ["l2", "l1", "linf", "topk:k=10", "mean"]
CPU = torch.device("cpu")


def images(step: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A batch of two kinds of noise; the same numbers in every dtype."""
    stream = torch.Generator().manual_seed(step)
    labels = torch.randint(0, 4, (8,), generator=stream)
    pixels = torch.randn((8, 3, 12, 12), generator=stream, dtype=torch.float64)
    pixels += labels.view(-1, 1, 1, 1) / 2
    return pixels.to(dtype).contiguous(memory_format=torch.channels_last), labels


def make_state(norm: Any, dtype: torch.dtype, steps: int = 50) -> TrainingState:
    torch.manual_seed(0)
    # Built in float32, so that the start does not depend on the dtype.
    module = MODELS.get("resnet8").build(num_classes=4, in_channels=3, norm=norm, width=8).to(dtype)
    lr = {"epoch": 0, "optimizer": "SGD", "lr": 0.02, "momentum": 0.9, "weight_decay": 5e-4}
    regime = build([lr])
    return TrainingState(module, regime, Clock(0, steps, 1), device=CPU)


def build(phases: list[dict[str, Any]]):
    from norm_matters.regimes import build_regime

    return build_regime(RegimeConfig(phases=phases), default="constant")


def step(state: TrainingState, number: int, dtype: torch.dtype, **options: Any) -> tuple[float, list[Tensor]]:
    """One step: the loss, and the gradients that it was made with."""
    meter = Meter(CPU)
    train_step(state, *images(number, dtype), options=StepOptions(**options), meter=meter)
    return meter.scores().loss, [p.grad.clone() for p in state.module.parameters() if p.grad is not None]


def distance(gradients: list[Tensor], truth: list[Tensor]) -> float:
    """How far from the truth, relative to its length."""
    found, true = (torch.cat([part.double().flatten() for part in several]) for several in (gradients, truth))
    return float((found - true).norm() / true.norm())


def statistics(module: nn.Module) -> list[Tensor]:
    return [buffer.clone() for name, buffer in module.named_buffers() if "running" in name]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("spec", SPECS)
def test_one_step_from_twenty_states_agrees_with_the_reference(spec, dtype):
    """Loss, gradients and statistics. The kernels lead; the reference starts anew from each state."""
    state, twin = (make_state(norm_factory(spec), dtype) for _ in range(2))
    exact = make_state(norm_factory(spec), torch.float64)
    for number in range(20):
        for other in (twin, exact):
            other.module.load_state_dict(state.module.state_dict())
        _, truth = step(exact, number, torch.float64)
        with dispatch.kernels("reference"):
            expected_loss, expected = step(twin, number, dtype)
        loss, found = step(state, number, dtype)
        assert loss == pytest.approx(expected_loss, rel=1e-5 if dtype == torch.float32 else 0.02)
        # Roundings in a network of several layers grow to what the reference has of them; kernels have no more.
        assert distance(found, truth) <= 1.5 * distance(expected, truth) + torch.finfo(dtype).eps
        for one, other in zip(statistics(state.module), statistics(twin.module), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4 if dtype == torch.float32 else 0.05, atol=1e-3)


def float64_curve(norm: Any, steps: int = 50, **options: Any) -> list[float]:
    state = make_state(norm, torch.float64, steps)
    return [step(state, number, torch.float64, **options)[0] for number in range(steps)]


class _Everything:
    """The reference as a fast backend: then float64 takes the way through the operations, too."""

    def __getattr__(self, name: str) -> Any:
        return getattr(reference, name)


@pytest.mark.parametrize(
    "spec", [spec if spec in ("l1", "linf") else pytest.param(spec, marks=pytest.mark.slow) for spec in SPECS]
)
def test_fifty_steps_in_float64_agree(spec, monkeypatch):
    """Plain torch, the operations on the reference, and outputs made again: three ways, one curve to 1e-9."""
    plain = float64_curve(norm_factory(spec))
    monkeypatch.setattr(dispatch, "_backend_of", lambda device: cast(Any, _Everything()))
    for options in ({}, {"save_memory": True}):
        assert float64_curve(norm_factory(spec), **options) == pytest.approx(plain, rel=1e-9)


def test_fifty_steps_of_l2_are_those_of_torch():
    assert float64_curve(norm_factory("l2")) == pytest.approx(float64_curve(nn.BatchNorm2d), rel=1e-9)


@pytest.mark.parametrize("spec", SPECS)
def test_golden_curve(spec):
    """Training loss of 20 steps in float64, as it was on 2026-11-22. (Run as a program, this file writes it anew.)"""
    with GOLDEN.open(newline="") as file:
        golden = [float(row[spec]) for row in csv.DictReader(file)]
    assert len(golden) == 20
    assert float64_curve(norm_factory(spec), 20) == pytest.approx(golden, rel=1e-9)


if __name__ == "__main__":
    curves = [float64_curve(norm_factory(spec), 20) for spec in SPECS]
    with GOLDEN.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerows([SPECS, *[[f"{loss:.15g}" for loss in row] for row in zip(*curves, strict=True)]])
