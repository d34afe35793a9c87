"""Decisions made on the device, on a CPU told to defer: the same training as when the host looks at every step."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from norm_matters.core.clock import Clock
from norm_matters.core.config import RegimeConfig
from norm_matters.core.errors import NumericalError
from norm_matters.engine.loop import training_rows
from norm_matters.engine.metrics import Meter
from norm_matters.engine.nonfinite import PATIENCE
from norm_matters.engine.state import TrainingState
from norm_matters.engine.step import SETTLE_EVERY, StepOptions, train_step
from norm_matters.norms import create_norm
from norm_matters.regimes import build_regime

CPU = torch.device("cpu")
PHASES = [{"epoch": 0, "optimizer": "SGD", "lr": 0.1, "momentum": 0.9}]
ADAM = [{"epoch": 0, "optimizer": "Adam", "lr": 0.01}]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        create_norm("l1", 8),
        nn.ReLU(),
        nn.BatchNorm2d(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 7),
    )


def state_of(*, deferred: bool, precision: str = "fp32", phases=PHASES) -> TrainingState:
    regime = build_regime(RegimeConfig(phases=phases), default="constant")
    return TrainingState(network(), regime, Clock(0, 3, 20), device=CPU, precision=precision, deferred=deferred)


def batch(seed: int, *, poisoned: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(16, 3, 6, 6, generator=draw), torch.randint(0, 7, (16,), generator=draw)
    if poisoned:
        images[3, 1, 2, 2] = float("nan")
    return images, labels


def train(state: TrainingState, steps: range, *, poisoned: frozenset[int] = frozenset(), **options) -> Meter:
    meter = Meter(CPU)
    for step in steps:
        train_step(state, *batch(step, poisoned=step in poisoned), options=StepOptions(**options), meter=meter)
    return meter


def everything(state: TrainingState) -> dict[str, torch.Tensor]:
    return copy.deepcopy(state.model_tensors() | state.optimizer.tensors())


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize("phases", [PHASES, ADAM])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "amp-fp16"])
@pytest.mark.parametrize("options", [{}, {"accumulate": 3, "clip_norm": 0.5, "nonfinite": "skip"}])
def test_finite_training_is_the_same_to_the_bit(phases, precision, options) -> None:
    host, deferred = (state_of(deferred=flag, precision=precision, phases=phases) for flag in (False, True))
    meters = [train(state, range(6), **options) for state in (host, deferred)]
    deferred.settle()
    assert_equal(everything(host), everything(deferred))
    assert meters[0].scores() == meters[1].scores()
    assert host.numbers() == deferred.numbers()


@pytest.mark.parametrize("poisoned", [{0}, {2}, {0, 1, 4}, {5}])
@pytest.mark.parametrize("phases", [PHASES, ADAM])
@pytest.mark.parametrize("precision", ["fp32", "amp-fp16"])
def test_steps_are_skipped_as_the_host_would_skip_them(poisoned, phases, precision) -> None:
    host, deferred = (state_of(deferred=flag, precision=precision, phases=phases) for flag in (False, True))
    meters = [train(state, range(6), poisoned=frozenset(poisoned), nonfinite="skip") for state in (host, deferred)]
    deferred.settle()
    assert_equal(everything(host), everything(deferred))
    assert meters[0].scores() == meters[1].scores()
    assert (host.skipped_steps, host.given_up_in_a_row) == (deferred.skipped_steps, deferred.given_up_in_a_row)
    assert deferred.skipped_steps == len(poisoned)
    assert host.numbers() == deferred.numbers()
    assert len(deferred.incidents) == 1
    assert f"step {min(poisoned) + 1}; {len(poisoned)} skipped by step 6" in deferred.incidents[0]


def test_an_overflow_at_the_loss_scale_is_as_on_the_host() -> None:
    host, deferred = (state_of(deferred=flag, precision="amp-fp16") for flag in (False, True))
    for state in (host, deferred):
        assert state.scale is not None
        train(state, range(2))
        state.scale.scale = 2.0**60
        train(state, range(2, 4))
        state.scale.scale = 1024.0
        train(state, range(4, 6))
        state.settle()
        assert state.skipped_steps == 2
        assert state.scale.scale == 1024.0
    assert_equal(everything(host), everything(deferred))
    assert host.numbers() == deferred.numbers()


def test_gradients_that_overflow_at_every_scale_end_the_run() -> None:
    state = state_of(deferred=True, precision="amp-fp16")
    assert state.scale is not None
    train(state, range(1))
    state.scale.scale = 2.0**-15
    with pytest.raises(NumericalError, match="any loss scale"):
        state.settle()


def test_stop_takes_no_step_from_the_first_bad_one_on_and_says_so_when_the_host_looks() -> None:
    state = state_of(deferred=True)
    train(state, range(3))
    weights = {name: p.detach().clone() for name, p in state.module.named_parameters()}
    optimizer = copy.deepcopy(state.optimizer.tensors())
    train(state, range(3, 8), poisoned=frozenset({3}))
    assert_equal(weights, {name: p.detach() for name, p in state.module.named_parameters()})
    assert_equal(optimizer, state.optimizer.tensors())
    with pytest.raises(NumericalError, match=r"not finite in epoch 2, step 4; no step was taken since.*after step 8"):
        state.settle()


def test_the_host_looks_every_so_many_steps_and_at_the_end_of_an_epoch() -> None:
    state = state_of(deferred=True)
    bad = frozenset({SETTLE_EVERY - 10})
    with pytest.raises(NumericalError, match=f"step {SETTLE_EVERY - 9};.*after step {SETTLE_EVERY}"):
        train(state, range(SETTLE_EVERY + 5), poisoned=bad)
    assert state.clock.step == SETTLE_EVERY

    class Batches:
        def __len__(self) -> int:
            return 3

        def epoch(self, epoch: int, start: int = 0):
            for number in range(3):
                yield Batch(*batch(number, poisoned=(epoch, number) == (1, 0)))

    rows = training_rows(state_of(deferred=True), train=Batches(), val=Batches(), options=StepOptions())
    next(rows)
    with pytest.raises(NumericalError, match="in epoch 2, step 4"):
        next(rows)


class Batch:
    def __init__(self, images: torch.Tensor, labels: torch.Tensor) -> None:
        self.images, self.labels = images, labels


def test_too_many_in_a_row_end_the_run_wherever_in_the_interval_they_were() -> None:
    state = state_of(deferred=True)
    train(state, range(5), nonfinite="skip")
    train(state, range(5, 5 + PATIENCE), poisoned=frozenset(range(5, 5 + PATIENCE)), nonfinite="skip")
    state.settle()
    assert state.given_up_in_a_row == PATIENCE
    train(state, range(1), poisoned=frozenset({0}), nonfinite="skip")
    train(state, range(2), nonfinite="skip")
    with pytest.raises(NumericalError, match=f"more than {PATIENCE} steps"):
        state.settle()


class Reads(TorchDispatchMode):
    """Counts how often a value is fetched from the device."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("precision", "options"),
    [("fp32", {}), ("fp32", {"nonfinite": "skip", "clip_norm": 1.0}), ("amp-fp16", {"accumulate": 2})],
)
@pytest.mark.parametrize("momentum", [0.9, 0.0])
def test_no_step_but_the_first_waits_for_the_device(precision, options, momentum, monkeypatch) -> None:
    # What norms may ask of a CPU without waiting.
    monkeypatch.setattr("norm_matters.norms.batchwise._is_at_hand", lambda x: False)
    state = state_of(deferred=True, precision=precision, phases=[{**PHASES[0], "momentum": momentum}])
    train(state, range(1), **options)
    with Reads() as reads:
        train(state, range(1, 5), **options)
    assert reads.count == 0
    with Reads() as reads:
        train(state_of(deferred=False, precision=precision), range(2), **options)
    assert reads.count > 0, "the control: waiting is seen"


@pytest.mark.parametrize(
    ("phases", "options"), [(PHASES, {"nonfinite": "rollback"}), ([{**PHASES[0], "foreach": True}], {})]
)
def test_where_the_device_cannot_decide_the_host_does(phases, options) -> None:
    state = state_of(deferred=True, phases=phases)
    if options:
        state.remember()
    train(state, range(2), **options)
    assert state.verdicts(options.get("nonfinite", "stop")) is None


def test_a_network_with_projected_weights_is_looked_at_by_the_host() -> None:
    from norm_matters.weights import normalise_weights

    module = network()
    normalise_weights(module, "projected")
    regime = build_regime(RegimeConfig(phases=PHASES), default="constant")
    state = TrainingState(module, regime, Clock(0, 3, 2), device=CPU, deferred=True)
    assert state.verdicts("stop") is None
