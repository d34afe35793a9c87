"""Which weights can be scaled: told by scaling them, and leaving no trace."""

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import norm_matters as nm
from norm_matters.core.errors import UserError
from norm_matters.engine.instruments.invariance import output_changes
from norm_matters.norms import create_norm


def network(*, first: str, second: str, activation: type[nn.Module] = nn.ReLU) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        create_norm(first, 8),
        activation(),
        # Without a bias, which is not scaled: a batch norm would remove it, others do not.
        nn.Conv2d(8, 8, 3, bias=False),
        create_norm(second, 8),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(32, 5),
    )


BATCH = torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize(
    ("first", "second", "activation", "invariant"),
    [
        ("l2", "l1", nn.ReLU, ["0.weight", "3.weight"]),
        ("linf", "layer", nn.ReLU, ["0.weight", "3.weight"]),
        # Without a sigma of its own the first layer's scale goes through a ReLU to the next norm, not through a tanh.
        ("mean", "l2", nn.ReLU, ["0.weight", "3.weight"]),
        ("mean", "l2", nn.Tanh, ["3.weight"]),
        ("l1", "none", nn.ReLU, ["0.weight"]),
        ("none", "none", nn.ReLU, []),
    ],
)
def test_weights_that_a_norm_follows_are_invariant(
    first: str, second: str, activation: type[nn.Module], invariant: list[str], dtype: torch.dtype
) -> None:
    module = network(first=first, second=second, activation=activation)
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-3
    assert nm.scale_invariant_weights(module.to(dtype), BATCH.to(dtype), tolerance=tolerance) == invariant


def test_the_answer_is_of_training_whatever_the_mode_and_leaves_no_trace() -> None:
    module = network(first="l2", second="topk:k=10").eval()
    module[1].train()
    flags = [layer.training for layer in module.modules()]
    before = copy.deepcopy(module.state_dict())
    stream = torch.get_rng_state()
    assert nm.scale_invariant_weights(module, BATCH) == ["0.weight", "3.weight"]
    assert [layer.training for layer in module.modules()] == flags
    assert torch.equal(torch.get_rng_state(), stream)
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert all(parameter.grad is None for parameter in module.parameters())


def test_the_last_layers_output_changes_by_the_factor() -> None:
    module = network(first="l2", second="l2").double()
    module[8].bias.data.zero_()
    for factor in (2.0, 0.5, 3.0):
        changes = output_changes(module, BATCH.double(), factor=factor)
        assert changes["8.weight"] == pytest.approx(abs(factor - 1), rel=1e-12)
        assert changes["0.weight"] < 1e-4


def test_outputs_of_any_structure_count() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 4, bias=False), nn.Linear(3, 4, bias=False)
            self.norm = create_norm("l2", 4)

        def forward(self, x: Tensor) -> dict:
            return {"a": (self.norm(self.a(x)), torch.arange(3)), "b": [self.b(x), None]}

    assert nm.scale_invariant_weights(Two(), BATCH.flatten(1)[:, :3]) == ["a.weight"]


def test_a_bounded_weight_is_invariant_by_itself_and_an_output_without_length_tells_nothing() -> None:
    class Unit(nn.Module):
        def forward(self, v: Tensor) -> Tensor:
            return v / v.norm()

    layer = nn.Linear(3, 4, bias=False)
    nn.utils.parametrize.register_parametrization(layer, "weight", Unit())
    assert nm.scale_invariant_weights(layer, BATCH.flatten(1)[:, :3]) == ["parametrizations.weight.original"]
    silent = nn.Linear(3, 4, bias=False)
    assert math.isnan(output_changes(silent, torch.zeros(2, 3))["weight"])
    assert nm.scale_invariant_weights(silent, torch.zeros(2, 3)) == []


@pytest.mark.parametrize("factor", [1, 0, -2.0, math.inf, math.nan])
def test_a_factor_that_tells_nothing_is_refused(factor: float) -> None:
    with pytest.raises(UserError, match="factor"):
        nm.scale_invariant_weights(nn.Linear(2, 2), torch.zeros(1, 2), factor=factor)
