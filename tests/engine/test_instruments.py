"""What is measured of networks as they train: which weights, in which precision; norms' sigma and inputs."""

import copy
import random

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.engine.instruments.collect import Instruments
from norm_matters.engine.instruments.norms import NormInputs, input_range
from norm_matters.engine.instruments.tracked import channel_rows, tracked_weights
from norm_matters.engine.metrics import Meter
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.norms import create_norm
from norm_matters.regimes import build_regime

SGD = {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-3}


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        create_norm("l1", 8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 6, 3, bias=False),
        create_norm("group:groups=2", 6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 7),
    )


def state_of(module: nn.Module, precision: str = "fp32", **settings) -> TrainingState:
    regime = build_regime(RegimeConfig(phases=[{"epoch": 0, **(settings or SGD)}]), default="constant")
    return TrainingState(module, regime, Clock(0, 1, 100), device=torch.device("cpu"), precision=precision)


def batch(n: int = 32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 6, 6, generator=generator), torch.randint(0, 7, (n,), generator=generator)


def epoch(state: TrainingState, instruments: Instruments | None, **options) -> dict[tuple[str, str], np.ndarray]:
    """An epoch of one step on the batch; what was measured in it."""
    state.module.train()
    images, labels = batch()
    if instruments is None:
        train_step(state, images, labels, options=StepOptions(**options), meter=Meter(state.device))
        return {}
    with instruments.step(1):
        train_step(state, images, labels, options=StepOptions(**options), meter=Meter(state.device))
    instruments.end_epoch(images)
    return instruments.values()


def masters_or_weights(state: TrainingState) -> dict[str, Tensor]:
    return {name: tensor.detach().double().clone() for name, tensor in state.model_tensors().items()}


def angle_of(before: Tensor, after: Tensor) -> np.ndarray:
    """Between the rows, by Kahan's formula rather than the one under test."""
    a, b = (nn.functional.normalize(rows.flatten(1).double(), dim=1) for rows in (before, after))
    return (2 * torch.atan2((a - b).norm(dim=1), (a + b).norm(dim=1))).numpy()


@pytest.mark.parametrize("precision", ["fp32", "amp-bf16", "bf16", "fp16"])
@pytest.mark.parametrize("accumulate", [1, 4])
def test_norms_and_angles_are_those_of_what_the_optimizer_moves(precision: str, accumulate: int) -> None:
    state = state_of(network(), precision)
    if state.scale is not None:
        state.scale.scale = 8.0
    instruments = Instruments(state)
    for _ in range(2):
        before = masters_or_weights(state)
        found = epoch(state, instruments, accumulate=accumulate)
        after = masters_or_weights(state)
        assert state.skipped_steps == 0
        for layer in ("0", "4", "8"):
            old, new = before[f"{layer}.weight"], after[f"{layer}.weight"]
            np.testing.assert_allclose(found["weight_norm", layer], new.flatten(1).norm(dim=1), rtol=1e-12)
            angles = np.sort(angle_of(old, new))
            n = len(angles)
            np.testing.assert_allclose(
                found["angle", layer], angles[np.round(np.linspace(0, n - 1, 5)).astype(int)], rtol=1e-7
            )
            np.testing.assert_allclose(found["layer_angle", layer], angle_of(old[None], new[None]), rtol=1e-7)
            assert found["effective_lr", layer] == pytest.approx(0.1 / (0.1 * old.norm().item() ** 2), rel=1e-12)
            assert found["equilibrium", layer] == pytest.approx(np.sqrt(2 * 0.1 * 1e-3 / 1.9), rel=1e-12)


def test_settings_are_those_of_each_layers_group() -> None:
    settings = {**SGD, "groups": {"last": {"weight_decay": 0.0, "lr": 0.5}}}
    found = epoch(state := state_of(network(), **settings), Instruments(state))
    assert np.isnan(found["equilibrium", "8"])
    assert found["equilibrium", "4"] > 0
    state = state_of(network(), **settings)
    length = state.module[8].weight.detach().double().norm().item()
    assert found["effective_lr", "8"] == pytest.approx(0.5 / (0.1 * length**2), rel=1e-7)


@pytest.mark.parametrize("optimizer", ["AdamW", "Adam", "RMSprop"])
def test_other_optimizers_have_measured_angles_only(optimizer: str) -> None:
    found = epoch(state := state_of(network(), optimizer=optimizer, lr=0.01, weight_decay=0.1), Instruments(state))
    for layer in ("0", "4", "8"):
        assert found["layer_angle", layer] > 1e-3
        assert np.isnan(found["effective_lr", layer])
        assert np.isnan(found["equilibrium", layer])


def test_a_skipped_step_has_no_angle_and_frozen_weights_have_no_rate() -> None:
    module = network()
    module[4].weight.requires_grad_(False)
    state = state_of(module, "fp16")
    assert state.scale is not None
    instruments = Instruments(state)
    state.scale.scale = 2.0**60
    found = epoch(state, instruments)
    assert state.skipped_steps == 1
    for layer in ("0", "4", "8"):
        assert np.isnan(found["angle", layer]).all()
        assert np.isnan(found["layer_angle", layer])
        assert np.isfinite(found["weight_norm", layer]).all()
    state.scale.scale = 8.0
    found = epoch(state, instruments)
    assert state.skipped_steps == 1
    assert (found["angle", "0"] > 0).all()
    assert (found["angle", "4"] == 0).all()
    assert np.isnan(found["effective_lr", "4"])


class Doubled(nn.Module):
    """A parametrization that counts, in training, how often it is computed."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, v: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
        return 2 * nn.functional.normalize(v, dim=(1, 2, 3), eps=0)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_parametrized_weights_are_measured_as_they_are_applied(precision: str) -> None:
    module = network()
    parametrize.register_parametrization(module[4], "weight", Doubled())
    state = state_of(module, precision)
    if state.scale is not None:
        state.scale.scale = 8.0
    name = "4.parametrizations.weight.original"
    v = masters_or_weights(state)[name]
    instruments = Instruments(state)
    calls = module[4].parametrizations.weight[0].calls.item()
    found = epoch(state, instruments)
    assert module[4].parametrizations.weight[0].calls == calls + 1, "measuring computed it in training mode"
    np.testing.assert_allclose(found["weight_norm", "4"], 2, rtol=1e-6)
    np.testing.assert_allclose(
        found["angle", "4"][[0, 4]],
        np.sort(angle_of(v, masters_or_weights(state)[name]))[[0, -1]],
        rtol=1e-3,  # the effective weight is rounded to float32
    )
    # The rate acts on the vector that the optimizer moves.
    assert found["effective_lr", "4"] == pytest.approx(0.1 / (0.1 * v.norm().item() ** 2), rel=1e-6)


def test_torchs_weight_norm_is_followed_by_its_direction() -> None:
    module = network()
    parametrizations.weight_norm(module[4])
    assert [(weight.layer, weight.parameter) for weight in tracked_weights(module)] == [
        ("0", "0.weight"),
        ("4", "4.parametrizations.weight.original1"),
        ("8", "8.weight"),
    ]


def test_every_parametrized_weight_is_followed_and_a_tied_one_once() -> None:
    """What a parametrization computes is gone at once, and another tensor may get its identity: none is left out."""
    layers = [nn.Linear(3, 2) for _ in range(200)]
    layers[7].weight = layers[8].weight = layers[3].weight
    shared, other = nn.Tanh(), nn.Sigmoid()
    for index, layer in enumerate(layers):
        step = shared if index in (3, 7) else other if index == 8 else nn.Tanh()
        parametrize.register_parametrization(layer, "weight", step)
    found = [weight.layer for weight in tracked_weights(nn.Sequential(*layers))]
    assert found == [str(index) for index in range(200) if index != 7]  # 8 has the same original, but is another weight


def test_which_weights_are_followed() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(2, 3))
            self.position = nn.Parameter(torch.zeros(1, 4, 3))
            self.attention = nn.MultiheadAttention(4, 2)
            self.up = nn.ConvTranspose2d(6, 8, 3, groups=2)
            self.norm = nn.LayerNorm([3, 4])
            self.one = nn.Conv2d(4, 4, 1, groups=4)
            self.head = nn.Linear(4, 5)
            self.tied = nn.Linear(4, 5)
            self.tied.weight = self.head.weight

    found = {weight.layer: tuple(weight.channels({}).shape) for weight in tracked_weights(Model())}
    assert found == {
        "weight": (2, 3),
        "attention.in_proj_weight": (12, 4),
        "attention.out_proj": (4, 4),
        "up": (8, 27),
        "head": (5, 4),
    }


@pytest.mark.parametrize("groups", [1, 2])
def test_channels_are_those_of_the_output(groups: int) -> None:
    """A change of one row changes one channel of the output, for both kinds of convolution."""
    x = torch.randn(1, 4, 5, 5)
    for layer in (nn.Conv2d(4, 6, 3, groups=groups), nn.ConvTranspose2d(4, 6, 3, groups=groups)):
        rows = channel_rows(layer, torch.arange(layer.weight.numel()).view_as(layer.weight))
        assert rows.shape == (6, layer.weight.numel() // 6)
        before = layer(x)
        with torch.no_grad():
            layer.weight.view(-1)[rows[3]] += 1
        changed = (layer(x) - before).abs().amax((0, 2, 3)) > 1e-4
        assert changed.tolist() == [False, False, False, True, False, False]


def test_sigma_is_the_root_of_the_running_variance() -> None:
    state = state_of(network())
    instruments = Instruments(state)
    found = epoch(state, instruments)
    sigma = np.sort(state.module[1].running_var.double().sqrt().numpy())
    np.testing.assert_allclose(found["sigma", "1"], sigma[[0, 2, 4, 5, 7]], rtol=1e-7)
    assert [column.layer for column in instruments.columns if column.instrument == "sigma"] == ["1"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_range_of_an_input(dtype: torch.dtype) -> None:
    x = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    x[0, 0, 0, :2] = torch.tensor([-300.0, 0.0])
    if dtype == torch.float32:
        x[1, 1, 1, :4] = torch.tensor([1e-9, -1e-30, 7e4, -6e4])
    values = x.double().numpy()
    for per_channel, axes in ((True, (0, 2, 3)), (False, (1, 2, 3))):
        largest, total, squares, outside = input_range(x, per_channel=per_channel).tolist()
        assert largest == np.abs(values).max()
        assert total == pytest.approx(np.abs(values).sum(axes).max(), rel=1e-5)
        assert squares == pytest.approx(np.square(values).sum(axes).max(), rel=1e-5)
        assert outside == pytest.approx((3 if dtype == torch.float32 else 0) / 300, rel=1e-6)
    x[2, 2, 2, 2] = torch.inf
    assert input_range(x, per_channel=True)[3] == pytest.approx((4 if dtype == torch.float32 else 1) / 300, rel=1e-6)


def test_input_ranges_are_those_of_the_measured_step() -> None:
    state = state_of(network())
    instruments = Instruments(state, level="all")
    copied = copy.deepcopy(state.module).train()
    found = epoch(state, instruments, accumulate=2)
    inputs = torch.cat([copied[0](chunk) for chunk in batch()[0].chunk(2)])
    assert found["input_max", "1"] == pytest.approx(inputs.abs().max().item(), rel=1e-6)
    # A chunk is what the norm normalises.
    sums = max(chunk.abs().sum((0, 2, 3)).max().item() for chunk in inputs.chunk(2))
    assert found["input_sum_abs", "1"] == pytest.approx(sums, rel=1e-5)
    assert found["input_outside_float16", "1"] == 0
    assert found["input_max", "5"] > 0
    assert not any(module._forward_pre_hooks for module in state.module.modules()), "hooks are left behind"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "amp-bf16"])
def test_measuring_changes_no_bit(precision: str) -> None:
    """Weights, running statistics, optimizer, flags and random streams, with everything measured and with nothing."""
    states = [state_of(network(), precision) for _ in range(2)]
    for state in states:
        state.module[3].eval()  # set by hand
    streams = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    results = []
    for state, instruments in zip(states, (None, Instruments(states[1], level="all")), strict=True):
        torch.set_rng_state(streams[0])
        for _ in range(3):
            epoch(state, instruments)
        results.append({**state.model_tensors(), **state.training_tensors()})
        assert (np.random.get_state()[1] == streams[1]).all()
        assert random.getstate() == streams[2]
    assert results[0].keys() == results[1].keys()
    for name, tensor in results[0].items():
        assert torch.equal(tensor, results[1][name]), name
    flags = [[module.training for module in state.module.modules()] for state in states]
    assert flags[0] == flags[1]


def test_a_network_without_weights_or_norms_is_measured_too() -> None:
    class Bias(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bias = nn.Parameter(torch.zeros(7))

        def forward(self, x: Tensor) -> Tensor:
            return x.flatten(1)[:, :7] + self.bias

    state = state_of(Bias())
    assert epoch(state, Instruments(state, level="all")) == {}


def test_what_norms_were_given_before_a_run_was_left_still_counts() -> None:
    """The largest values came before, so nothing else would tell that they have been forgotten."""
    module = nn.Sequential(create_norm("l2", 4), create_norm("layer", 4))
    batches = [torch.randn(6, 4, 5, 5) * scale for scale in (1e5, 1.0)]

    def measure(instrument: NormInputs, images: Tensor) -> None:
        instrument.before_step()
        module(images)
        instrument.after_step(made=True)

    whole, before, after = (NormInputs(module) for _ in range(3))
    for images in batches:
        measure(whole, images)
    measure(before, batches[0])
    after.load(before.tensors())
    measure(after, batches[1])
    found, expected = (np.concatenate(each.end_epoch(torch.empty(0))) for each in (after, whole))
    assert np.array_equal(found, expected)
    assert expected[0] > 1e5, "the first batch has the largest values"
