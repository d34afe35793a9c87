"""Absorbing: exact for every norm and every kind of layer, and only where nothing else sees the layer."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from norm_matters.core.torchvision import torchvision
from norm_matters.norms import NORMS, absorb_norm, convert_norm, create_norm
from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.weights import normalise_weights, remove_weight_norm

LAYERS = {
    "conv1d": lambda bias: nn.Conv1d(4, 6, 3, padding=1, bias=bias),
    "conv2d": lambda bias: nn.Conv2d(4, 6, 3, stride=2, bias=bias),
    "conv3d": lambda bias: nn.Conv3d(4, 6, 2, bias=bias),
    "dilated": lambda bias: nn.Conv2d(4, 6, 3, dilation=2, padding=2, padding_mode="reflect", bias=bias),
    "grouped": lambda bias: nn.Conv2d(4, 6, 3, groups=2, bias=bias),
    "depthwise": lambda bias: nn.Conv2d(4, 8, 3, groups=4, bias=bias),
    "transposed1d": lambda bias: nn.ConvTranspose1d(4, 6, 3, bias=bias),
    "transposed2d": lambda bias: nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, bias=bias),
    "transposed3d": lambda bias: nn.ConvTranspose3d(4, 6, 2, bias=bias),
    "transposed grouped": lambda bias: nn.ConvTranspose2d(4, 6, 3, groups=2, dilation=2, bias=bias),
    "linear": lambda bias: nn.Linear(4, 6, bias=bias),
}


FOLDABLE = [name for name in NORMS.names() if issubclass(NORMS.get(name), BatchwiseNorm)]
SPECS = [*FOLDABLE, "l2:affine=false", "l1:bias=false", "mean:scale=true", "topk:k=3,eps=0.1"]


def fill(model: nn.Module, seed: int = 0) -> nn.Module:
    """Statistics and parameters as training might leave them; evaluation mode."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        for key, tensor in [*module.named_buffers(recurse=False), *module.named_parameters(recurse=False)]:
            if key == "running_var" and getattr(module, "estimates_sigma", True):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 3 + 0.05)
            elif key == "running_mean" or (key in ("weight", "bias") and tensor.dim() == 1):
                tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
    return model.eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("spec", SPECS)
def test_every_norm_into_every_layer(spec, kind):
    dims = {"linear": 0, "1d": 1, "3d": 3}.get("linear" if kind == "linear" else kind[-2:], 2)
    x = images(3, 4, *[6] * dims)
    for bias in (True, False):
        layer = LAYERS[kind](bias)
        channels = layer.out_features if kind == "linear" else layer.out_channels
        for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-13)):
            model = fill(nn.Sequential(copy.deepcopy(layer), create_norm(spec, channels)).to(dtype))
            before = model(x.to(dtype))
            report = absorb_norm(model, x.to(dtype))
            assert type(model[1]) is nn.Identity
            difference = (model(x.to(dtype)) - before).abs().max()
            assert difference <= tolerance * before.abs().max()
            assert report.difference == difference.item()
            assert report.relative <= tolerance
            assert "largest output difference" in str(report)


class Block(nn.Module):
    """Registered in another order than used; a sum; a shortcut with a layer of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm2 = create_norm("l1", 4)
        self.norm1 = create_norm("l1", 4)
        self.shortcut = nn.Conv2d(4, 4, 1)
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.conv1 = nn.Conv2d(4, 4, 3, padding=1)
        self.last = create_norm("l1", 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        if y.shape[0] > 0:
            y = self.norm2(self.conv2(y))
        return F.relu(self.last(y + self.shortcut(x)))


def test_the_order_of_use_counts_and_what_cannot_be_folded_says_why():
    model = fill(Block())
    before = model(images(2, 4, 5, 5))
    report = absorb_norm(model, images(3, 4, 8, 8))
    assert [(row.name, row.before, row.after, row.note) for row in report.rows] == [
        ("norm2", "l1", "Identity", "in Conv2d 'conv2'"),
        ("norm1", "l1", "Identity", "in Conv2d 'conv1'"),
    ]
    assert [(row.name, row.note) for row in report.left] == [("last", "follows add, no convolution or linear layer")]
    assert "follows add" in str(report)
    torch.testing.assert_close(model(images(2, 4, 5, 5)), before, rtol=1e-4, atol=1e-5)


class Net(nn.Module):
    """A convolution and a norm, joined by what a test says."""

    def __init__(self, use, **layers: nn.Module) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.norm = create_norm("l1", 4)
        for name, layer in layers.items():
            self.add_module(name, layer)
        self.use = use

    def forward(self, x: Tensor):
        return self.use(self, x)


def padded_convolution() -> nn.Conv2d:
    return nn.Conv2d(4, 4, 3, padding=1)


def tie(net: Net) -> Net:
    net.other.weight = net.conv.weight
    return net


class Standardised(nn.Conv2d):
    """A convolution that standardises its weight, as timm's StdConv2d."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, F.layer_norm(self.weight, self.weight.shape[1:]), self.bias, padding=1)


class Padded(nn.Conv2d):
    """A convolution that pads as it likes, as timm's Conv2dSame."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 2, 1, 0)))


LEFT = {
    "follows relu, no": Net(lambda net, x: net.norm(net.conv(x).relu())),
    "follows relu_, no": Net(lambda net, x: net.norm(net.conv(x).relu_())),
    "follows max_pool2d_with_indices, no": Net(lambda net, x: net.norm(F.max_pool2d(net.conv(x), 2))),
    "follows no convolution": Net(lambda net, x: net.conv(net.norm(x))),
    "'conv' before it is also read by mul": Net(lambda net, x: net.norm(y := net.conv(x)) + 2 * y),
    "'conv' before it is also read by the model's output": Net(
        lambda net, x: {"a": net.norm(y := net.conv(x)), "b": [y]}
    ),
    "'conv' before it is used 2 times": Net(lambda net, x: net.norm(net.conv(net.conv(x)))),
    "is used 2 times": Net(lambda net, x: net.norm(net.other(net.norm(net.conv(x)))), other=padded_convolution()),
    "the example does not reach it": Net(lambda net, x: net.conv(x)),
    r"'conv' before it shares its parameters with other\.weight": tie(
        Net(lambda net, x: net.norm(net.conv(net.other(x))), other=padded_convolution())
    ),
    "'conv' before it has its channels in another": Net(lambda net, x: net.norm(net.conv(x)), conv=nn.Linear(8, 4)),
    r"'conv' before it \(Standardised\) changes its weight": Net(
        lambda net, x: net.norm(net.conv(x)), conv=Standardised(4, 4, 3)
    ),
}


@pytest.mark.parametrize("reason", LEFT)
def test_a_norm_is_left_with_the_reason(reason):
    model = fill(copy.deepcopy(LEFT[reason]))
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"layer 'norm' \(l1\): .*{reason}"):
        absorb_norm(model, images(2, 4, 8, 8))
    after = model.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_two_norms_on_one_layer_are_left():
    model = fill(Net(lambda net, x: net.norm(y := net.conv(x)) + net.second(y), second=create_norm("l2", 4)))
    with pytest.raises(ValueError, match="'conv' before it is also read by second"):
        absorb_norm(model, images(2, 4, 8, 8))


def test_a_layer_that_only_pads_is_folded():
    model = fill(nn.Sequential(Padded(4, 6, 3), create_norm("l1", 6)))
    before = model(images(2, 4, 8, 8))
    assert absorb_norm(model, images(2, 4, 8, 8)).count == 1
    torch.testing.assert_close(model(images(2, 4, 8, 8)), before, rtol=1e-4, atol=1e-5)


def test_dropout_and_identity_between_do_no_harm():
    layers = [nn.Conv2d(4, 6, 3), nn.Dropout(0.5), nn.Identity(), create_norm("l1", 6)]
    model = fill(nn.Sequential(*layers))
    before = model(images(2, 4, 8, 8))
    assert absorb_norm(model, images(2, 4, 8, 8)).count == 1
    torch.testing.assert_close(model(images(2, 4, 8, 8)), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "fused", [{"act": nn.SiLU()}, {"drop": nn.Identity(), "act": nn.SiLU()}, {"drop": nn.Tanh(), "act": nn.SiLU()}]
)
def test_what_is_fused_to_the_norm_stays(fused):
    norm = create_norm("l1", 6)
    for key, layer in fused.items():
        norm.add_module(key, layer)
    model = fill(nn.Sequential(OrderedDict(conv=nn.Conv2d(4, 6, 3), bn=norm)))
    before = model(images(2, 4, 8, 8))
    report = absorb_norm(model, images(2, 4, 8, 8))
    assert report.rows[0].after == type(model.bn).__name__
    assert not any(module.training for module in model.modules())
    torch.testing.assert_close(model(images(2, 4, 8, 8)), before, rtol=1e-4, atol=1e-5)


def test_normalised_weights_have_to_be_made_plain_first():
    model = fill(nn.Sequential(nn.Conv2d(4, 6, 3), create_norm("mean", 6), nn.Flatten(), nn.Linear(216, 2)))
    normalise_weights(model, "bounded")
    with pytest.raises(ValueError, match="parametrised; make it plain first"):
        absorb_norm(model, images(2, 4, 8, 8))
    assert parametrize.is_parametrized(model[0])
    before = model(images(2, 4, 8, 8))
    remove_weight_norm(model)
    absorb_norm(model, images(2, 4, 8, 8))
    torch.testing.assert_close(model(images(2, 4, 8, 8)), before, rtol=1e-4, atol=1e-5)


def test_patterns_and_torchs_own_norms():
    layers = {"a": nn.Conv2d(4, 4, 1), "one": create_norm("l1", 4), "b": nn.Conv2d(4, 4, 1), "two": nn.BatchNorm2d(4)}
    layers |= {"c": nn.Conv2d(4, 4, 1), "three": create_norm("layer", 4)}
    model = fill(nn.Sequential(OrderedDict(layers)))
    before = model(images(2, 4, 8, 8))
    report = absorb_norm(model, images(2, 4, 8, 8), exclude="one")
    assert [(row.name, row.before) for row in report.rows] == [("two", "BatchNorm2d")]
    assert [(row.name, row.note) for row in report.left] == [("three", "has no running statistics")]
    torch.testing.assert_close(model(images(2, 4, 8, 8)), before, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"'three' \(layer\): has no running statistics"):
        absorb_norm(model, images(2, 4, 8, 8), include="three")
    with pytest.raises(ValueError, match="no norm that is selected"):
        absorb_norm(model, images(2, 4, 8, 8), include="four")


def test_a_norm_under_two_names_is_replaced_under_both():
    norm = create_norm("l1", 4)
    model = fill(Net(lambda net, x: net.norm(net.conv(x)), again=norm))
    model.norm = norm
    absorb_norm(fill(model), images(2, 4, 8, 8))
    assert type(model.norm) is nn.Identity
    assert model.again is model.norm


def test_training_mode_and_compiled_models_are_refused():
    model = nn.Sequential(nn.Conv2d(4, 4, 1), create_norm("l1", 4))
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        absorb_norm(model, images(2, 4, 8, 8))
    model.eval()[1].train()
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        absorb_norm(model, images(2, 4, 8, 8))
    with pytest.raises(ValueError, match="absorb its norms first, then compile"):
        absorb_norm(torch.compile(model.eval(), backend="eager"), images(2, 4, 8, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_weights_stay_half(dtype):
    model = fill(nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), create_norm("l1", 6)))
    model[0].to(dtype)
    report = absorb_norm(model, images(2, 4, 8, 8).to(dtype))
    assert model[0].weight.dtype == model[0].bias.dtype == dtype
    assert report.relative < 8 * torch.finfo(dtype).eps


def test_memory_layout_and_trainability_stay():
    model = fill(nn.Sequential(nn.Conv2d(4, 6, 3), create_norm("l1", 6)).to(memory_format=torch.channels_last))
    model[0].weight.requires_grad_(False)
    absorb_norm(model, images(2, 4, 8, 8))
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert not model[0].weight.requires_grad


def pretrained_like(model: nn.Module, x: Tensor, spec: str = "l1") -> nn.Module:
    convert_norm(model, spec)
    with torch.no_grad():
        for _ in range(3):
            model.train()(x)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folded", "left"), [("resnet18", 20, 0), ("densenet121", 59, 62)])
def test_torchvisions_networks(name, folded, left):
    torch.manual_seed(0)
    x = images(2, 3, 64, 64)
    model = pretrained_like(torchvision.models.get_model(name), x)
    report = absorb_norm(model, x)
    assert (report.count, len(report.left)) == (folded, left)
    assert report.relative < 1e-4
    assert {row.note for row in report.left} <= {
        f"follows {op}, no convolution or linear layer" for op in ("cat", "max_pool2d_with_indices", "avg_pool2d")
    }


@pytest.mark.slow
@pytest.mark.parametrize(("name", "folded", "left"), [("tf_efficientnet_b0", 49, 0), ("resnetv2_50", 32, 17)])
def test_timms_networks(name, folded, left):
    """Own padding and fused activations in the first; norms before the layers in the second."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    x = images(2, 3, 64, 64)
    model = pretrained_like(timm.create_model(name), x)
    report = absorb_norm(model, x)
    assert (report.count, len(report.left)) == (folded, left)
    assert report.relative < 1e-4
