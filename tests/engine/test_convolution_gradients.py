"""Gradients of convolutions of any width, as the engine lays them out: oneDNN's own are wrong for some narrow ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

from norm_matters.engine.compiled import Forward, compiled_forward
from norm_matters.engine.tensors import lay_out, spoils_memory
from norm_matters.weights import normalise_weights

CHANNELS_LAST = torch.channels_last


def narrow(width: int, *, kernel: int = 1, stride: int = 2, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(width, 2 * width, kernel, stride=stride, groups=groups, bias=False)


def gradients(forward: Forward, module: nn.Module, images: torch.Tensor) -> list[torch.Tensor | None]:
    module.zero_grad()
    forward(images).square().sum().backward()
    return [parameter.grad for parameter in module.parameters()]


def check(width: int, *, weight_norm: str | None = None, compiled: bool = False) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(width)
        module = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), narrow(width))
        images = torch.randn(33, 3, 16, 16).contiguous(memory_format=CHANNELS_LAST)
    if weight_norm:
        normalise_weights(module, weight_norm)
    # float64 is not oneDNN's.
    reference = copy.deepcopy(module).double()
    expected = gradients(reference, reference, images.double())
    lay_out(module, CHANNELS_LAST)
    forward = compiled_forward(module) if compiled else module
    for _ in range(2):
        for ours, its in zip(gradients(forward, module, images), expected, strict=True):
            assert ours is not None
            assert its is not None
            # Sums that nearly cancel are rounded to 3e-5 of the largest; what oneDNN gets wrong is off by 4e-3 or more.
            torch.testing.assert_close(ours.double(), its, rtol=0, atol=1e-4 * float(its.abs().max()))


@pytest.mark.parametrize("weight_norm", [None, "bounded"])
@pytest.mark.parametrize("width", [1, 2, 3, 4, 7, 8, 12, 16])
def test_they_are_those_of_float64(width: int, weight_norm: str | None) -> None:
    check(width, weight_norm=weight_norm)


def test_however_it_is_called_laid_out_or_made() -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            fixed = narrow(3)
            weight = fixed.weight.detach()
            del fixed.weight
            fixed.register_buffer("weight", weight)
            self.fixed, self.down = fixed, narrow(6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.down(input=self.fixed(x))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module, images = Named(), torch.randn(5, 3, 16, 16)
    reference = copy.deepcopy(module).double()
    (expected,) = gradients(reference, reference, images.double())
    for _ in range(3):
        lay_out(module, CHANNELS_LAST)
    assert [len(each._forward_pre_hooks) for each in (module.fixed, module.down)] == [1, 1]
    (ours,) = gradients(module, module, images.contiguous(memory_format=CHANNELS_LAST))
    assert ours is not None
    assert expected is not None
    torch.testing.assert_close(ours.double(), expected, rtol=0, atol=1e-4 * float(expected.abs().max()))


def test_to_ask_changes_nothing() -> None:
    """Spectral norm takes a step of its power iteration wherever its weight is looked at in training."""
    module = spectral_norm(narrow(2)).train()
    before = copy.deepcopy(module.state_dict())
    assert spoils_memory(module)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_they_are_when_compiled() -> None:
    check(4, compiled=True)


def test_what_is_right_is_left_as_fast_as_it_is() -> None:
    spoiled = [narrow(2), narrow(15), narrow(16, groups=2)]
    right = [narrow(16), narrow(2, stride=1), narrow(2, kernel=3), nn.Linear(2, 2), nn.Flatten()]
    assert all(map(spoils_memory, spoiled))
    assert not any(map(spoils_memory, right))
    images = torch.randn(2, 16, 8, 8).contiguous(memory_format=CHANNELS_LAST)
    assert lay_out(narrow(16), CHANNELS_LAST)(images).is_contiguous(memory_format=CHANNELS_LAST)
