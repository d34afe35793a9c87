"""The optimizer against formulas and torch's own, and its state through a save and a load to the bit."""

import copy
import json

import pytest
import torch
from torch import nn

from norm_matters.core.clock import Clock
from norm_matters.core.errors import UserError
from norm_matters.regimes import Regime, RegimeOptimizer
from norm_matters.regimes.settings import optimizer_names

CLOCK = Clock(0, steps_per_epoch=3, epochs=4)


def network(*, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4, bias=bias), nn.Tanh(), nn.Linear(4, 2, bias=bias)).to(dtype)


def train(module, optimizer, steps, clock=CLOCK):
    """Take the given steps on data that depends on the step alone, and return the learning rates."""
    rates = []
    for step in steps:
        data = torch.randn(5, 3, generator=torch.Generator().manual_seed(step)).to(next(module.parameters()).dtype)
        rates.append(optimizer.prepare(clock.at_step(step)))
        optimizer.zero_grad()
        module(data).square().mean().backward()
        optimizer.step()
    return rates


def weights(module):
    return {name: parameter.detach().clone() for name, parameter in module.named_parameters()}


def test_sgd_follows_its_formula_through_two_phases():
    module = nn.Linear(1, 1, bias=False, dtype=torch.float64)
    regime = Regime([{"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}, {"step": 2, "lr": 0.01, "weight_decay": 0}])
    optimizer = RegimeOptimizer(module, regime)
    value, velocity = module.weight.item(), 0.0
    for step, (rate, decay) in enumerate([(0.1, 0.01), (0.1, 0.01), (0.01, 0.0), (0.01, 0.0)]):
        assert optimizer.prepare(CLOCK.at_step(step)) == rate
        optimizer.zero_grad()
        module(torch.full((1, 1), 2.0, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
        velocity = 0.9 * velocity + 8 * value + decay * value
        value -= rate * velocity
        assert module.weight.item() == pytest.approx(value, rel=1e-12)


def test_a_schedule_gives_each_step_its_own_rate():
    module = network()
    regime = Regime([{"lr": {"schedule": "linear", "from": 1.2, "to": 0.0}}])
    rates = train(module, RegimeOptimizer(module, regime), range(12))
    assert rates == pytest.approx([0.1 * (12 - step) for step in range(12)])


def test_each_group_has_its_own_settings():
    module = network(dtype=torch.float64)
    before = weights(module)
    regime = Regime(
        [{"lr": 0.5, "groups": {"bias": {"lr": 0.0}, "last": {"lr": 0.25}}}, {"step": 1, "groups": {"last": {"lr": 0}}}]
    )
    optimizer = RegimeOptimizer(module, regime)
    train(module, optimizer, [0])
    gradients = {name: parameter.grad for name, parameter in module.named_parameters()}
    for name, rate in {"0.weight": 0.5, "0.bias": 0.0, "2.weight": 0.25, "2.bias": 0.25}.items():
        torch.testing.assert_close(module.get_parameter(name), before[name] - rate * gradients[name])
    between = weights(module)
    train(module, optimizer, [1])
    assert torch.equal(module[2].weight, between["2.weight"])
    assert not torch.equal(module[0].weight, between["0.weight"])


def test_a_setting_goes_back_to_its_default_when_it_is_unset():
    module = network()
    optimizer = RegimeOptimizer(module, Regime([{"lr": 0.1, "momentum": 0.9}, {"step": 1, "momentum": None}]))
    train(module, optimizer, [0, 1])
    assert optimizer.optimizer.param_groups[0]["momentum"] == 0


def test_it_optimises_the_given_tensors_under_the_names_of_the_network():
    module = network()
    masters = {name: parameter.detach().double().requires_grad_() for name, parameter in module.named_parameters()}
    optimizer = RegimeOptimizer(
        module, Regime([{"lr": 1.0, "momentum": 0.9, "groups": {"bias": {"lr": 2.0}}}]), masters
    )
    assert all(ours is master for ours, master in zip(optimizer.parameters(), masters.values(), strict=True))
    for master in masters.values():
        master.grad = torch.ones_like(master)
    expected = {name: master.detach() - (2 if name.endswith("bias") else 1) for name, master in masters.items()}
    optimizer.prepare(CLOCK)
    optimizer.step()
    for name, master in masters.items():
        assert torch.equal(master, expected[name])
    assert set(optimizer.tensors()) == {f"{name}/momentum_buffer" for name in masters}


@pytest.mark.parametrize("change", [{"reset": True}, {"optimizer": "Adam"}])
def test_reset_and_a_change_of_optimizer_empty_the_state(change):
    module = network()
    optimizer = RegimeOptimizer(module, Regime([{"lr": 0.1, "momentum": 0.9}, {"step": 2, **change}]))
    train(module, optimizer, [0, 1])
    assert optimizer.tensors()
    optimizer.prepare(CLOCK.at_step(2))
    assert not optimizer.tensors()
    train(module, optimizer, [2])
    state = optimizer.tensors()
    optimizer.prepare(CLOCK.at_step(3))
    assert optimizer.tensors().keys() == state.keys(), "the state is emptied once, not at every step of the phase"


@pytest.mark.parametrize(
    ("name", "first", "second"),
    [
        ("Adam", {"amsgrad": False}, {"amsgrad": True}),
        ("RMSprop", {"centered": False}, {"centered": True}),
        ("RMSprop", {"momentum": 0}, {"momentum": 0.9}),
        ("SGD", {"momentum": 0}, {"momentum": 0.9}),
    ],
)
def test_settings_that_need_other_state_can_change_in_mid_run(name, first, second):
    module = network()
    regime = Regime([{"optimizer": name, "lr": 0.01, **first}, {"step": 2, **second}])
    before = weights(module)
    train(module, RegimeOptimizer(module, regime), range(4))
    assert all(torch.isfinite(parameter).all() for parameter in module.parameters())
    assert not torch.equal(module[0].weight, before["0.weight"])


CASES = [({"optimizer": name}, {}) for name in optimizer_names()]
CASES += [
    ({"optimizer": "SGD", "momentum": 0.9, "nesterov": True}, {"momentum": 0.5}),
    ({"optimizer": "RMSprop", "momentum": 0.9, "centered": True}, {"reset": True}),
    ({"optimizer": "RMSprop"}, {"centered": True}),
    ({"optimizer": "AdamW", "amsgrad": True, "fused": True}, {}),
    ({"optimizer": "SGD", "momentum": 0.9}, {"optimizer": "AdamW"}),
    ({"optimizer": "Adam", "betas": [0.8, 0.9]}, {"optimizer": "SGD", "momentum": 0.9}),
]


@pytest.mark.parametrize(("first", "second"), CASES)
@pytest.mark.parametrize("cut", [4, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_run_that_was_cut_goes_on_to_the_bit(first, second, cut, dtype):
    regime = Regime([{"lr": 0.02, **first}, {"step": 5, "lr": 0.01, **second}])
    whole = network(bias=first["optimizer"] != "Muon", dtype=dtype)
    early = copy.deepcopy(whole)
    train(whole, RegimeOptimizer(whole, regime), range(9))

    optimizer = RegimeOptimizer(early, regime)
    train(early, optimizer, range(cut))
    tensors = {name: tensor.clone() for name, tensor in optimizer.tensors().items()}
    numbers = json.loads(json.dumps(optimizer.numbers()))
    late = copy.deepcopy(early)
    resumed = RegimeOptimizer(late, regime)
    resumed.load(tensors, numbers, CLOCK.at_step(cut))
    saved = {name: tensor.clone() for name, tensor in tensors.items()}
    train(late, resumed, range(cut, 9))

    for name, weight in weights(whole).items():
        assert torch.equal(late.get_parameter(name), weight)
    assert all(torch.equal(tensors[name], saved[name]) for name in saved), "what was loaded must be a copy"


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW", "RMSprop"])
def test_without_its_state_the_run_would_differ(name):
    """The control: the test above can fail."""
    regime = Regime([{"optimizer": name, "lr": 0.02, **({"momentum": 0.9} if name == "SGD" else {})}])
    whole = network()
    optimizer = RegimeOptimizer(whole, regime)
    train(whole, optimizer, range(3))
    forgetful = copy.deepcopy(whole)
    train(whole, optimizer, range(3, 6))
    train(forgetful, RegimeOptimizer(forgetful, regime), range(3, 6))
    assert not torch.equal(forgetful[0].weight, whole[0].weight)


@pytest.fixture
def saved():
    module = network()
    regime = Regime([{"optimizer": "Adam", "lr": 0.1}])
    optimizer = RegimeOptimizer(module, regime)
    train(module, optimizer, range(2))
    return RegimeOptimizer(module, regime), optimizer.tensors(), optimizer.numbers()


def test_a_missing_entry_is_named(saved):
    optimizer, tensors, numbers = saved
    del tensors["2.bias/exp_avg"]
    with pytest.raises(UserError, match=r"2\.bias/exp_avg is missing"):
        optimizer.load(tensors, numbers, CLOCK.at_step(2))


def test_an_extra_entry_is_named(saved):
    optimizer, tensors, numbers = saved
    with pytest.raises(UserError, match=r"2\.bias/other is unexpected"):
        optimizer.load({**tensors, "2.bias/other": torch.zeros(2)}, numbers, CLOCK.at_step(2))


def test_the_state_of_another_network_is_refused(saved):
    _, tensors, numbers = saved
    other = RegimeOptimizer(nn.Linear(3, 3), Regime([{"optimizer": "Adam", "lr": 0.1}]))
    with pytest.raises(UserError, match=r"bias is missing, weight is missing, .* and 1 more") as caught:
        other.load(tensors, numbers, CLOCK.at_step(2))
    assert len(caught.value.problems) == 1


def test_a_network_without_parameters_is_refused():
    with pytest.raises(UserError, match="no parameters to train"):
        RegimeOptimizer(nn.ReLU(), Regime([{"lr": 0.1}]))


def test_an_optimizer_that_does_not_take_this_network_is_refused():
    with pytest.raises(UserError, match="torch refuses to train this network with Muon"):
        RegimeOptimizer(network(), Regime([{"optimizer": "Muon", "lr": 0.1}]))


@pytest.mark.parametrize(
    ("settings", "words"),
    [({"momentun": 0.9}, "momentun: unknown setting; did you mean 'momentum'"), ({"momentum": "x"}, "momentum: 'x'")],
)
def test_a_function_that_goes_wrong_later_is_named_with_the_step(settings, words):
    regime = Regime([{"lr": 0.1, "epoch_lambda": lambda epoch: settings if epoch else {}}], name="mine")
    optimizer = RegimeOptimizer(network(), regime)
    optimizer.prepare(CLOCK.at_step(2))
    with pytest.raises(UserError, match=f"mine, step 3: {words}"):
        optimizer.prepare(CLOCK.at_step(3))
