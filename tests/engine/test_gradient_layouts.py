"""Gradients lie in memory as their weights do: torch's fused optimizers on CPUs read both side by side, unasked."""

import pytest
import torch

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.models import MODELS
from norm_matters.norms import norm_factory
from norm_matters.regimes import build_regime
from norm_matters.weights import normalise_weights

CPU = torch.device("cpu")


@pytest.mark.parametrize("weight_norm", [None, "bounded"])
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["fp32", "amp-bf16", "bf16"])
def test_gradients_lie_as_their_weights_do(precision: str, accumulate: int, weight_norm: str | None) -> None:
    module = MODELS.get("resnet8").build(num_classes=4, in_channels=3, norm=norm_factory("l1"), width=8)
    if weight_norm:
        normalise_weights(module, weight_norm)
    regime = build_regime(RegimeConfig(phases=[{"optimizer": "SGD", "lr": 0.1, "momentum": 0.9}]), default="constant")
    state = TrainingState(module, regime, Clock(0, 10, 1), device=CPU, precision=precision)
    images = torch.randn(8, 3, 12, 12).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(8) % 4
    for _ in range(2):
        train_step(state, images, labels, options=StepOptions(accumulate=accumulate), meter=Meter(CPU))
    parameters = list(state.optimizer.parameters())
    assert any(parameter.ndim == 4 for parameter in parameters)
    for parameter in parameters:
        assert parameter.grad is not None
        # Where a dimension is 1 its stride means nothing.
        for size, ours, its in zip(parameter.shape, parameter.stride(), parameter.grad.stride(), strict=True):
            assert size == 1 or ours == its
