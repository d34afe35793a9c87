"""The fused optimizers against torch's loop over the parameters, and what they must not trip over."""

import copy
import subprocess
import sys

import pytest
import torch
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.regimes import Regime, RegimeOptimizer

CLOCK = Clock(0, steps_per_epoch=3, epochs=4)
SETTINGS = [
    {"optimizer": "SGD", "lr": 0.1},
    {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "weight_decay": 1e-2},
    {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "nesterov": True},
    {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"optimizer": "Adam", "lr": 0.01, "weight_decay": 1e-2},
    {"optimizer": "AdamW", "lr": 0.01, "amsgrad": True},
    {"optimizer": "Adagrad", "lr": 0.1},
]
NAN = float("nan")


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)


def take_steps(module: nn.Module, optimizer: RegimeOptimizer, steps: range, leave_out: set[int] | None = None) -> None:
    for step in steps:
        draw = torch.Generator().manual_seed(step)
        optimizer.prepare(CLOCK.at_step(step))
        optimizer.zero_grad()
        module(torch.randn(5, 3, 4, 4, generator=draw)).square().mean().backward()
        if leave_out is None:
            optimizer.step()
            continue
        if step in leave_out:
            for parameter in module.parameters():
                parameter.grad = torch.full_like(parameter, NAN)
        optimizer.step(torch.tensor(step in leave_out))


@pytest.mark.parametrize("settings", SETTINGS)
def test_the_fused_form_is_taken_and_agrees_with_the_loop(settings) -> None:
    module, other = network(), network()
    ours = RegimeOptimizer(module, Regime([settings]))
    take_steps(module, ours, range(6))
    assert ours.takes_flag
    own = {key: value for key, value in settings.items() if key != "optimizer"}
    plain = getattr(torch.optim, settings["optimizer"])(other.parameters(), **own, foreach=False)
    for step in range(6):
        plain.zero_grad()
        other(torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(step))).square().mean().backward()
        plain.step()
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "fused", "foreach"),
    [
        ({"optimizer": "SGD"}, True, None),
        ({"optimizer": "SGD", "fused": False}, False, None),
        ({"optimizer": "Adam", "foreach": True}, None, True),
        ({"optimizer": "RMSprop"}, None, None),
    ],
)
def test_what_the_regime_asks_for_is_kept(settings, fused, foreach) -> None:
    group = RegimeOptimizer(network(), Regime([{"lr": 0.1, **settings}])).optimizer.param_groups[0]
    assert (group.get("fused"), group.get("foreach")) == (fused, foreach)


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_state_that_was_saved_without_its_memory_layout_goes_on_to_the_bit(settings) -> None:
    """Files know no strides, and fused optimizers read weights and state side by side as they lie."""
    whole, regime = network(), Regime([settings])
    optimizer = RegimeOptimizer(whole, regime)
    take_steps(whole, optimizer, range(3))
    saved = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in optimizer.tensors().items()}
    late = copy.deepcopy(whole)
    resumed = RegimeOptimizer(late, regime)
    resumed.load(saved, optimizer.numbers(), CLOCK.at_step(3))
    take_steps(whole, optimizer, range(3, 6))
    take_steps(late, resumed, range(3, 6))
    for a, b in zip(whole.parameters(), late.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_parameter_whose_gradient_comes_late_starts_its_momentum_there() -> None:
    settings = {"optimizer": "SGD", "lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours, plain = ([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))] for _ in range(2))
    named = nn.ParameterDict({"a": ours[0], "b": ours[1]})
    optimizer = RegimeOptimizer(named, Regime([settings]))
    other = torch.optim.SGD(plain, lr=0.1, momentum=0.9, dampening=0.5, foreach=False)
    for step in range(4):
        optimizer.prepare(CLOCK.at_step(step))
        for parameters in (ours, plain):
            parameters[0].grad = torch.full((2,), 1.0 + step)
            parameters[1].grad = torch.full((3,), 2.0) if step else None
        optimizer.step()
        other.step()
    assert optimizer.takes_flag
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("left_out", [{0}, {0, 1}, {2}, {1, 3}])
def test_a_step_that_is_left_out_is_as_if_it_had_never_been(settings, left_out) -> None:
    module, other = network(), network()
    regime = Regime([settings])
    optimizer, reference = RegimeOptimizer(module, regime), RegimeOptimizer(other, regime)
    take_steps(module, optimizer, range(5), leave_out=left_out)
    for step in sorted(set(range(5)) - left_out):
        take_steps(other, reference, range(step, step + 1))
    for a, b in zip(module.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
    expected = reference.tensors()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in optimizer.tensors().items())


def test_training_imports_no_compiler() -> None:
    script = """
import sys, torch
from norm_matters.core.clock import Clock
from norm_matters.regimes import Regime, RegimeOptimizer
for name in ("SGD", "Adam", "RMSprop"):
    module = torch.nn.Linear(2, 2)
    optimizer = RegimeOptimizer(module, Regime([{"optimizer": name, "lr": 0.1}]))
    optimizer.prepare(Clock(0, 3, 3))
    optimizer.zero_grad()
    module(torch.ones(1, 2)).sum().backward()
    optimizer.step()
assert "torch._dynamo" not in sys.modules
module = torch.optim.SGD(torch.nn.Linear(2, 2).parameters())
assert "torch._dynamo" in sys.modules, "torch imports it where it is left to itself"
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
