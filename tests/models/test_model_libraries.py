"""Networks of timm and torchvision: as built, or with every batch norm converted."""

import importlib.util

import pytest
import torch
from torch import nn

import norm_matters.core.torchvision  # noqa: F401  (before timm, which needs torchvision importable)
from norm_matters.core.config import ModelConfig
from norm_matters.core.errors import UserError
from norm_matters.models import build_model, check_model, create_model, library_models
from norm_matters.norms import has_spec, spec_of

timm = pytest.importorskip("timm")

NETWORKS = ["timm:resnet10t", "timm:test_efficientnet", "torchvision:mobilenet_v3_small"]


def theirs(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]


def ours(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module.modules() if spec_of(layer)]


@pytest.mark.parametrize("name", NETWORKS)
def test_as_built_without_a_norm(name):
    built = build_model(ModelConfig(name=name), num_classes=6, in_channels=3, input_size=64)
    assert built.converted == 0
    assert theirs(built.module)
    assert not ours(built.module)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("in_channels", [1, 3])
def test_every_batch_norm_is_converted(name, in_channels):
    count = len(theirs(create_model(name, num_classes=6)))
    config = ModelConfig(name=name, norm="l1")
    built = build_model(config, num_classes=6, in_channels=in_channels, input_size=64)
    assert built.converted == count > 0
    assert not theirs(built.module)
    assert len(ours(built.module)) == count
    assert all(has_spec(layer, "l1") for layer in ours(built.module))
    scores = built.module(torch.randn(2, in_channels, 64, 64))
    scores.sum().backward()
    assert all(layer.weight.grad is not None for layer in ours(built.module))


def test_networks_that_give_several_outputs_in_training_are_built_with_one():
    module = create_model("torchvision:googlenet", num_classes=6)
    assert module(torch.randn(2, 3, 64, 64)).shape == (2, 6)


def test_options_are_the_librarys():
    assert create_model("timm:resnet10t", num_classes=6, drop_rate=0.3).drop_rate == 0.3  # type: ignore[comparison]
    with pytest.raises(UserError, match=r"model\.options: timm:resnet10t cannot be built.*no_such"):
        create_model("timm:resnet10t", num_classes=6, no_such=1)
    with pytest.raises(UserError, match=r"model\.options: torchvision:resnet18 cannot be built.*no_such"):
        create_model("torchvision:resnet18", num_classes=6, no_such=1)


@pytest.mark.parametrize(
    ("name", "option"), [("timm:resnet10t", "checkpoint_path"), ("torchvision:resnet18", "weights")]
)
def test_options_that_would_load_files_are_refused(name, option):
    with pytest.raises(UserError, match=rf"model\.options\.{option}"):
        create_model(name, num_classes=6, **{option: "DEFAULT"})


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("timm:resnt10t", r"unknown model 'timm:resnt10t'; did you mean 'timm:resnet10t'\?"),
        ("torchvision:resnt18", r"unknown model 'torchvision:resnt18'; did you mean 'torchvision:resnet18'\?"),
        ("torchvision:maskrcnn_resnet50_fpn", "unknown model"),
        ("timm:hf-hub:someone/something", "unknown model"),
        ("tim:resnet18", r"unknown library 'tim'; did you mean 'timm'\?"),
    ],
)
def test_unknown_names(name, message):
    with pytest.raises(UserError, match=message):
        check_model(name)


def test_names():
    check_model("timm:resnet18")
    check_model("timm:resnet18.a1_in1k")
    check_model("torchvision:vit_b_16")
    assert "timm:resnet18" in library_models("timm")
    assert "torchvision:resnet18" in library_models("torchvision")


def test_missing_timm_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'norm-matters\[timm\]'"):
        check_model("timm:resnet18")


def test_network_without_batch_norms_has_its_layer_norms_converted():
    built = build_model(ModelConfig(name="timm:test_convnext", norm="l1"), num_classes=6, in_channels=3, input_size=64)
    assert built.converted == 14
    assert built.conversion == "in place of 5 LayerNorm2d and 9 LayerNorm"
    assert {str(spec_of(layer)) for layer in ours(built.module)} == {
        "position:statistic=l1",
        "position:statistic=l1,channel_dim=-1",
    }


def test_kinds_of_norms_can_be_chosen():
    name = "timm:test_efficientnet_ln"
    config = ModelConfig(name=name, norm="l1", norm_kinds=["batch"])
    with pytest.raises(
        UserError, match=r"model\.norm: 'l1': nothing was converted.*no batch norm, but .*'layer'; name"
    ):
        build_model(config, num_classes=6, in_channels=3, input_size=64)
    name = "timm:efficientvit_b0"
    built = build_model(ModelConfig(name=name, norm="l1"), num_classes=6, in_channels=3, input_size=64)
    assert built.conversion == "in place of 26 BatchNorm2d, 1 LayerNorm left"
    config = ModelConfig(name=name, norm="l1", norm_kinds=["layer"])
    built = build_model(config, num_classes=6, in_channels=3, input_size=64)
    assert built.conversion == "in place of 1 LayerNorm, 26 BatchNorm2d left"
    assert len(theirs(built.module)) == 26


@pytest.mark.parametrize(
    ("name", "norm", "kinds", "message"),
    [
        ("timm:test_vit", None, ["layer"], r"model\.norm_kinds: says which norms become model\.norm; set that too"),
        ("resnet8", "l1", ["layer"], r"model\.norm_kinds: resnet8 is built with its norm"),
        ("timm:test_vit", "l1", ["layr"], "there is no kind of norm 'layr'; did you mean 'layer'"),
    ],
)
def test_kinds_of_norms_that_mean_nothing(name, norm, kinds, message):
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=6, norm=norm, norm_kinds=kinds)


def test_network_without_norms_is_no_silent_success():
    with pytest.raises(UserError, match=r"model\.norm: 'l1'.*the model has no layer or group norm"):
        create_model("timm:test_nfnet", num_classes=6, norm="l1")


def test_input_that_does_not_fit():
    name = "torchvision:squeezenet1_0"
    with pytest.raises(UserError, match=rf"model\.name: {name} fails on 3x8x8 images: \S+"):
        build_model(ModelConfig(name=name), num_classes=6, in_channels=3, input_size=8)


def test_norm_precision_needs_a_norm():
    config = ModelConfig(name="torchvision:resnet18", norm_precision="input")
    with pytest.raises(UserError, match=r"model\.norm_precision: 'input' needs a norm"):
        build_model(config, num_classes=6, in_channels=3, input_size=64)
