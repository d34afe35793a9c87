"""The step: accumulation, overflow, clipping, label smoothing, master weights."""

import copy

import pytest
import torch
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.errors import NumericalError
from norm_matters.engine.metrics import Meter
from norm_matters.engine.precision import LossScale
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.norms import create_norm, is_norm
from norm_matters.regimes import build_regime

GOOD, BAD = torch.tensor(True), torch.tensor(False)
PHASES = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}]


def network(norm: str = "group:groups=2") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        create_norm(norm, 8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
    )


def state_of(module: nn.Module, precision: str = "fp32", phases=PHASES) -> TrainingState:
    regime = build_regime(RegimeConfig(phases=phases), default="constant")
    return TrainingState(module, regime, Clock(0, 10, 2), device=torch.device("cpu"), precision=precision)


def batch(n: int = 128, dtype=torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 6, 6, generator=generator, dtype=dtype), torch.randint(0, 7, (n,), generator=generator)


def step(state: TrainingState, images, labels, **options) -> Meter:
    meter = Meter(state.device)
    train_step(state, images, labels, options=StepOptions(**options), meter=meter)
    return meter


@pytest.mark.parametrize("n", [128, 100, 31])
def test_accumulated_chunks_are_the_step_of_the_whole_batch(n: int) -> None:
    images, labels = batch(n, torch.float64)
    whole, chunked = state_of(network().double()), state_of(network().double())
    for _ in range(3):
        meters = step(whole, images, labels), step(chunked, images, labels, accumulate=4)
        assert meters[0].scores() == pytest.approx(meters[1].scores(), abs=1e-9)
    for a, b in zip(whole.module.parameters(), chunked.module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)


@pytest.mark.parametrize("precision", ["amp-fp16", "fp16"])
def test_an_overflow_skips_the_step_and_halves_the_scale(precision: str) -> None:
    state = state_of(network(), precision)
    step(state, *batch())
    assert state.scale is not None
    before = copy.deepcopy(state.model_tensors())
    optimizer = copy.deepcopy(state.optimizer.tensors())
    state.scale.scale = 2.0**60
    step(state, *batch())
    assert state.scale.scale == 2.0**59
    assert (state.skipped_steps, state.clock.step) == (1, 2)
    norm_buffers = {name for name, _ in state.module.named_buffers()}
    for name, tensor in state.model_tensors().items():
        assert name in norm_buffers or torch.equal(tensor, before[name])
    for name, tensor in state.optimizer.tensors().items():
        assert torch.equal(tensor, optimizer[name])
    step(state, *batch())
    assert state.skipped_steps == 2
    state.scale.scale = 1024.0
    step(state, *batch())
    assert state.skipped_steps == 2
    assert any(not torch.equal(tensor, before[name]) for name, tensor in state.model_tensors().items())


def test_the_scale_grows_after_many_good_steps_and_gives_up_at_the_smallest() -> None:
    scale = LossScale(8.0)
    for _ in range(LossScale.GROWTH_INTERVAL - 1):
        scale.update(GOOD)
    assert scale.scale == 8.0
    scale.update(GOOD)
    assert scale.scale == 16.0
    saved = scale.state()
    while scale.scale > LossScale.SMALLEST:
        scale.check()
        scale.update(BAD)
    scale.check()
    scale.update(BAD)
    with pytest.raises(NumericalError, match="not finite"):
        scale.check()
    scale.load(saved)
    assert (scale.scale, scale.good_steps) == (16.0, 0)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_low_precision_weights_are_the_rounded_masters_and_norms_stay_float32(precision: str) -> None:
    state = state_of(network("l1"), precision)
    for _ in range(3):
        step(state, *batch())
    full = state.model_tensors()
    low = torch.float16 if precision == "fp16" else torch.bfloat16
    for name, parameter in state.module.named_parameters():
        owner = state.module.get_submodule(name.rpartition(".")[0])
        assert parameter.dtype == (torch.float32 if is_norm(owner) else low)
        assert full[name].dtype == torch.float32
        assert torch.equal(full[name].to(parameter.dtype), parameter)
    assert any(not torch.equal(full[name], full[name].to(low).float()) for name in state.masters)
    for _, buffer in state.module.named_buffers():
        assert buffer.dtype in (torch.float32, torch.int64)


def test_clipping_bounds_the_gradient() -> None:
    plain = [{"epoch": 0, "optimizer": "SGD", "lr": 1.0}]
    state = state_of(network(), phases=plain)
    before = copy.deepcopy(state.model_tensors())
    step(state, *batch(), clip_norm=1e-3)
    moved = torch.stack([(tensor - before[name]).norm() for name, tensor in state.model_tensors().items()]).norm()
    assert moved.item() == pytest.approx(1e-3, rel=1e-3)


def test_label_smoothing_changes_the_training_loss_as_torch_defines_it() -> None:
    module, (images, labels) = network(), batch()
    logits = module(images)
    loss = step(state_of(module), images, labels, label_smoothing=0.1).scores().loss
    expected = nn.CrossEntropyLoss(label_smoothing=0.1)(logits, labels).item()
    assert loss == pytest.approx(expected, rel=1e-5)
    assert loss != pytest.approx(nn.CrossEntropyLoss()(logits, labels).item(), rel=1e-3)
