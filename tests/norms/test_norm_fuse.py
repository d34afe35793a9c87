"""A norm and the ReLU behind it as one operation."""

import copy

import pytest
import torch
from torch import nn

from norm_matters.models import MODELS
from norm_matters.norms import (
    absorb_norm,
    convert_norm,
    create_norm,
    fuse_activations,
    norm_factory,
    normalise_and_activate,
)
from norm_matters.norms.base import Norm

SPECS = ["l2", "l1", "linf", "mean", "none", "group:groups=2", "ghost:size=2,base=l1", "smooth:base=l1"]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def results(call, *tensors):
    given = [tensor.clone().requires_grad_() for tensor in tensors]
    y = call(*given)
    y.backward(draw(*y.shape, seed=9))
    return [y.detach(), *[tensor.grad for tensor in given]]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("spec", SPECS)
def test_fused_is_one_after_the_other(spec, training):
    """To the bit in float32: a hook, which takes the fusion apart, changes no result."""
    norm, x, residual = create_norm(spec, 4).train(training), draw(4, 4, 6, 6), draw(4, 4, 6, 6, seed=1)
    twin, relu = copy.deepcopy(norm), nn.ReLU()
    found = results(lambda x, r: normalise_and_activate(norm, relu, x, r), x, residual)
    expected = results(lambda x, r: (twin(x) + r).relu(), x, residual)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert [*map(torch.Tensor.tolist, norm.buffers())] == [*map(torch.Tensor.tolist, twin.buffers())]
    found = results(lambda x: normalise_and_activate(norm, relu, x), x)
    expected = results(lambda x: twin(x).relu(), x)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_the_input_is_not_overwritten():
    x = draw(4, 4, 6, 6)
    for spec in ("l1", "none"):
        before, y = x.clone(), create_norm(spec, 4)(x, relu=True)
        assert torch.equal(x, before)
        assert y.min() == 0


@pytest.mark.parametrize("who", ["norm", "activation"])
def test_hooks_see_what_they_would_without(who):
    norm, relu, x = create_norm("l1", 4), nn.ReLU(), draw(4, 4, 6, 6)
    seen = []
    module = norm if who == "norm" else relu
    module.register_forward_hook(lambda module, args, output: seen.append(output.min().item()))
    normalise_and_activate(norm, relu, x)
    assert len(seen) == 1
    assert (seen[0] < 0) == (who == "norm")


def test_other_activations_and_other_norms_are_called_as_they_are():
    x, residual = draw(4, 4, 6, 6), draw(4, 4, 6, 6, seed=1)
    bn = nn.BatchNorm2d(4)
    expected = nn.functional.gelu(bn(x) + residual)
    torch.testing.assert_close(normalise_and_activate(bn, nn.GELU(), x, residual), expected)
    norm = create_norm("l2", 4)
    torch.testing.assert_close(normalise_and_activate(norm, nn.GELU(), x, residual), expected)
    torch.testing.assert_close(normalise_and_activate(nn.Identity(), nn.ReLU(), x, residual), (x + residual).relu())


def sequential() -> nn.Sequential:
    shared = create_norm("l1", 4)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        create_norm("l1", 4),
        nn.ReLU(inplace=True),
        nn.Sequential(nn.Conv2d(4, 4, 1), create_norm("l2", 4), nn.ReLU()),
        *(nn.Conv2d(4, 4, 1), shared, nn.ReLU(), nn.Conv2d(4, 4, 1), shared),
        *(create_norm("linf", 4), nn.GELU()),
    )


def test_fuse_activations():
    model, x = sequential(), draw(4, 3, 8, 8)
    names = list(model.state_dict())
    twin = copy.deepcopy(model)
    assert fuse_activations(model) == ["1", "3.1"]
    assert list(model.state_dict()) == names
    assert isinstance(model[2], nn.Identity)
    assert fuse_activations(model) == []
    for one, other in zip(results(model, x), results(twin, x), strict=True):
        assert torch.equal(one, other)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one.grad, other.grad)
    torch.testing.assert_close(model.eval()(x), twin.eval()(x))


def test_fusing_leaves_what_has_hooks_and_other_containers():
    class Backwards(nn.Sequential):
        def forward(self, x):
            for layer in reversed(self):
                x = layer(x)
            return x

    model = sequential()
    model[1].register_forward_hook(lambda *call: None)
    model[3][2].register_forward_hook(lambda *call: None)
    assert fuse_activations(model) == []
    assert fuse_activations(Backwards(create_norm("l1", 3), nn.ReLU())) == []


def test_conversion_fuses_what_it_converts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 1))
    twin = copy.deepcopy(model)
    convert_norm(model, "l2")
    assert isinstance(model[1].act, nn.ReLU)
    x = draw(4, 3, 8, 8)
    torch.testing.assert_close(model(x), twin(x))
    convert_norm(model, "l1")
    assert isinstance(model[1].act, nn.ReLU)
    expected = absorb_norm(model.eval(), x)
    assert expected.count == 1
    assert not any(isinstance(module, Norm) for module in model.modules())


@pytest.mark.parametrize(("name", "options"), [("resnet8", {"width": 4}), ("resnet50", {"width": 8, "stem": "small"})])
def test_networks_of_ours_use_the_fused_form(name, options, monkeypatch):
    calls = []
    forward = Norm.forward

    def counted(self, x, residual=None, *, relu=False):
        calls.append((residual is not None, relu))
        return forward(self, x, residual, relu=relu)

    monkeypatch.setattr(Norm, "forward", counted)
    model = MODELS.get(name).build(num_classes=3, in_channels=3, norm=norm_factory("l1"), **options)
    model(draw(4, 3, 16, 16))
    blocks = {"resnet8": 3, "resnet50": 16}[name]
    layers = {"resnet8": 1, "resnet50": 2}[name]
    assert calls.count((True, True)) == blocks
    assert calls.count((False, True)) == layers * blocks + 1
    # What is left are the shortcuts.
    assert calls.count((False, False)) == {"resnet8": 2, "resnet50": 4}[name]
