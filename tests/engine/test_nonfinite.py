"""Steps that are not finite: named, skipped or rolled back, and never seen in the statistics."""

import contextlib
import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.errors import NumericalError
from norm_matters.engine.loop import training_rows
from norm_matters.engine.metrics import Meter
from norm_matters.engine.nonfinite import PATIENCE, all_finite, describe_range, first_nonfinite
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import StepOptions, train_step
from norm_matters.norms import RunningStatistics, create_norm
from norm_matters.regimes import build_regime

PHASES = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9}]


def network(norm: str = "l1") -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        create_norm(norm, 8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
    )


def state_of(module: nn.Module, precision: str = "fp32") -> TrainingState:
    regime = build_regime(RegimeConfig(phases=PHASES), default="constant")
    return TrainingState(module, regime, Clock(0, 3, 2), device=torch.device("cpu"), precision=precision)


def batch(seed: int = 1, n: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(n, 3, 6, 6, generator=draw), torch.randint(0, 7, (n,), generator=draw)


def poisoned(seed: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    images, labels = batch(seed)
    images[3, 1, 2, 2] = float("nan")
    return images, labels


def step(state: TrainingState, images, labels, **options) -> Meter:
    meter = Meter(state.device)
    train_step(state, images, labels, options=StepOptions(**options), meter=meter)
    return meter


def snapshot(state: TrainingState) -> dict[str, torch.Tensor]:
    return copy.deepcopy(state.model_tensors() | state.optimizer.tensors())


def assert_equal(state: TrainingState, before: dict[str, torch.Tensor]) -> None:
    now = state.model_tensors() | state.optimizer.tensors()
    assert now.keys() == before.keys()
    assert [name for name in now if not torch.equal(now[name], before[name])] == []


@pytest.mark.parametrize("accumulate", [1, 4])
def test_stop_names_the_layer_and_leaves_the_weights(accumulate):
    state = state_of(network())
    step(state, *batch())
    with torch.no_grad():
        state.module[3].weight[2, 3] = 3e38
    weights = {name: p.detach().clone() for name, p in state.module.named_parameters()}
    with pytest.raises(NumericalError) as caught:
        step(state, *batch(), accumulate=accumulate)
    assert "the training loss is not finite in epoch 1, step 2" in str(caught.value)
    assert "layer '3' (Conv2d)" in str(caught.value)
    assert "its input: " in str(caught.value)
    assert all(torch.equal(p, weights[name]) for name, p in state.module.named_parameters())


def test_stop_names_images_and_parameters_that_are_not_finite():
    state = state_of(network())
    with pytest.raises(NumericalError, match=r"the images are not finite: 1 of 1728 values not finite, the others"):
        step(state, *poisoned())
    with torch.no_grad():
        state.module[7].bias[1] = float("inf")
    with pytest.raises(NumericalError, match=r"the parameter '7.bias' is not finite"):
        step(state, *batch())


def test_a_gradient_that_is_not_finite_is_named_by_its_parameter():
    state = state_of(network())
    state.module[3].weight.register_hook(lambda gradient: gradient * float("inf"))
    with pytest.raises(NumericalError, match=r"a gradient is not finite .* the gradient of '3.weight' is not"):
        step(state, *batch())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_skipped_step_leaves_no_trace(precision):
    state = state_of(network(), precision)
    step(state, *batch())
    before = snapshot(state)
    meter = step(state, *poisoned(), nonfinite="skip")
    assert_equal(state, before)
    assert (state.clock.step, state.skipped_steps, meter.scores().images) == (2, 1, 0)
    assert "step skipped" in state.incidents[0]
    step(state, *batch(3), nonfinite="skip")
    assert state.given_up_in_a_row == 0
    with pytest.raises(AssertionError):
        assert_equal(state, before)


@pytest.mark.parametrize("precision", ["amp-fp16", "fp16"])
def test_an_overflow_of_the_loss_scale_does_not_leave_the_statistics_ahead(precision):
    state = state_of(network(), precision)
    step(state, *batch())
    before = snapshot(state)
    state.scale.scale = 2.0**60
    step(state, *batch(2))
    assert state.skipped_steps == 1
    assert_equal(state, before)
    state.scale.scale = 1024.0
    step(state, *batch(2))
    assert not torch.equal(state.module[1].running_mean, before["1.running_mean"])


def test_rollback_returns_to_the_beginning_of_the_epoch():
    state = state_of(network())
    step(state, *batch())
    state.remember()
    before = snapshot(state)
    step(state, *batch(3), nonfinite="rollback")
    step(state, *batch(4), nonfinite="rollback")
    step(state, *poisoned(), nonfinite="rollback")
    assert_equal(state, before)
    assert (state.clock.step, state.skipped_steps) == (4, 1)
    step(state, *batch(5), nonfinite="rollback")
    with pytest.raises(AssertionError):
        assert_equal(state, before)


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_patience_ends(policy):
    state = state_of(network())
    state.remember()
    for _ in range(PATIENCE):
        step(state, *poisoned(), nonfinite=policy)
    with pytest.raises(NumericalError, match=f"{PATIENCE} steps before were given up too"):
        step(state, *poisoned(), nonfinite=policy)


class Data:
    """Two epochs of three batches; the second batch of the second epoch is poisoned."""

    def __len__(self) -> int:
        return 3

    def epoch(self, epoch: int, start: int = 0):
        for number in range(3):
            bad = (epoch, number) == (1, 1)
            images, labels = (poisoned if bad else batch)(10 * epoch + number)
            yield type("Batch", (), {"images": images, "labels": labels})


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_rows_count_what_was_given_up(policy):
    state = state_of(network())
    val = type(
        "Val",
        (),
        {"epoch": lambda self, _: iter([type("Batch", (), dict(zip(("images", "labels"), batch(9), strict=True)))])},
    )
    rows = list(training_rows(state, train=Data(), val=val(), options=StepOptions(nonfinite=policy)))
    assert [row["skipped_steps"] for row in rows] == [0, 1]
    # One norm of ours refused the batch; a look for the cause counts nothing.
    assert [row["rejected_updates"] for row in rows] == [0, 1]
    assert all(torch.isfinite(torch.tensor(row["train_loss"])) for row in rows)
    assert all(tensor.isfinite().all() for tensor in state.model_tensors().values())
    resumed = state_of(network())
    resumed.load(state.model_tensors(), state.training_tensors(), state.numbers())
    assert resumed.rejected_updates() == 1


def test_the_look_for_the_cause_changes_nothing():
    module = network()
    module[0].weight.data[0] = 1e38
    module.insert(3, nn.Dropout(0.5))
    images = 1e3 * batch()[0]
    before = copy.deepcopy(module.state_dict()), torch.get_rng_state(), module[1].num_batches_rejected.clone()
    assert "layer '0' (Conv2d)" in first_nonfinite(module, images, contextlib.nullcontext)
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), before[0].values(), strict=True))
    assert torch.equal(torch.get_rng_state(), before[1])
    assert torch.equal(module[1].num_batches_rejected, before[2])
    assert not any(layer._forward_hooks for layer in module.modules())
    assert first_nonfinite(network(), batch()[0], contextlib.nullcontext) is None


def test_running_statistics_of_all_norms_commit_and_roll_back():
    module = network("topk:k=3")
    statistics = RunningStatistics(module)
    module(batch()[0])
    moved = copy.deepcopy(module.state_dict())
    statistics.commit()
    module(batch(2)[0])
    statistics.rollback()
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), moved.values(), strict=True))
    module(poisoned()[0])
    assert statistics.rejected() == 1


special = st.sampled_from([float("nan"), float("inf"), float("-inf")])


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-(2.0**100), 2.0**100, width=32) | special, min_size=1, max_size=8), st.booleans())
def test_all_finite_is_isfinite(values, half):
    tensor = torch.tensor(values).to(torch.bfloat16 if half else torch.float32)
    assert all_finite([torch.ones(3), tensor]) == bool(tensor.isfinite().all())


def test_a_range_in_words():
    assert describe_range(torch.tensor([1.0, -2.5])) == "2 values, from -2.5 to 1"
    assert describe_range(torch.tensor([1.0, float("nan")])) == "1 of 2 values not finite, the others from 1 to 1"
    assert describe_range(torch.tensor([float("inf")])) == "1 of 1 values not finite"
