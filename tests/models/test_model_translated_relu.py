"""The translated ReLU, and residual networks that train with it instead of norms."""

import pytest
import torch
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.models import create_model
from norm_matters.models.layers import TranslatedReLU
from norm_matters.norms import norms_of


def test_a_standard_normal_input_gives_mean_0_and_variance_1():
    x = torch.randn(1_000_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = TranslatedReLU()(x)
    assert y.mean().item() == pytest.approx(0, abs=0.005)
    assert y.var().item() == pytest.approx(1, abs=0.005)
    # The constants of models/trelu.py in the released code.
    assert TranslatedReLU()(torch.tensor([-1.0, 0.0, 2.0])).tolist() == pytest.approx(
        [-0.683332, -0.683332, 2.742385], abs=2e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_dtype_and_layout_stay(dtype):
    x = torch.randn(2, 3, 4, 4).to(dtype).contiguous(memory_format=torch.channels_last)
    y = TranslatedReLU()(x)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("name", ["resnet8", "resnet56", "resnet18", "resnet50"])
def test_signals_keep_their_size_at_any_depth(name):
    """The variance between images, positions and channels; He's weights and plain sums give 1e9 in resnet56."""
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, norm="none", weight_norm="bounded", width=16, activation="trelu")
    sizes = []
    for path, layer in model.named_modules():
        if path.startswith("layer") and path.count(".") == 1:
            layer.register_forward_hook(lambda module, inputs, output: sizes.append(output.square().mean().item()))
    model(torch.randn(8, 3, 32, 32))
    assert len(sizes) >= 3
    assert min(sizes) > 0.2
    assert max(sizes) < 6


def test_each_block_adds_its_share():
    torch.manual_seed(0)
    model = create_model("resnet8", num_classes=4, norm="none", width=4, activation="trelu")
    block = model.get_submodule("layer1.0")
    x = torch.randn(2, 4, 8, 8)
    active = TranslatedReLU()(x)
    branch = block.conv2(TranslatedReLU()(block.conv1(active)))
    torch.testing.assert_close(block(x), (1 / 3) ** 0.5 * branch + (2 / 3) ** 0.5 * x)
    halved = model.get_submodule("layer2.0")
    branch = halved.conv2(TranslatedReLU()(halved.conv1(active)))
    torch.testing.assert_close(halved(x), (1 / 3) ** 0.5 * branch + (2 / 3) ** 0.5 * halved.downsample(active))


def test_convolutions_have_a_bias_and_lecuns_variance():
    model = create_model("resnet18", num_classes=4, norm="none", activation="trelu", width=32)
    assert norms_of(model)
    for path, layer in model.named_modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.bias is not None, path
            fan_in = layer.weight[0].numel()
            assert layer.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.1), path


def test_an_unknown_activation_is_refused():
    with pytest.raises(UserError, match=r"model\.options\.activation: value 'gelu'.*'relu' or 'trelu'"):
        create_model("resnet8", num_classes=4, activation="gelu")
    with pytest.raises(UserError, match=r"model\.options\.activation: unknown option"):
        create_model("vgg11", num_classes=4, activation="trelu")
