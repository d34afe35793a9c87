"""Our own networks: every registered one by the same tests, and each family's own promises."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import norm_matters.models
from norm_matters.core.config import ModelConfig
from norm_matters.core.errors import UserError
from norm_matters.models import MODELS, Network, build_model, create_model
from norm_matters.models.layers import FixedGrid
from norm_matters.norms import norms_of, spec_of

FOLDER = Path(norm_matters.models.__file__).parent


def narrow(name: str, **options) -> Network:
    """The network with few channels, so that the test is quick."""
    module = create_model(name, num_classes=7, in_channels=2, norm="l1", width=4, **options)
    assert isinstance(module, Network)
    return module


def side_of(module: Network) -> int:
    return max(module.min_input_size, 8)


@pytest.mark.parametrize("name", MODELS.names())
def test_every_network_trains_one_step_at_its_smallest_input(name):
    module = narrow(name)
    side = side_of(module)
    scores = module(torch.randn(3, 2, side, side))
    assert scores.shape == (3, 7)
    scores.square().mean().backward()
    for parameter_name, parameter in module.named_parameters():
        assert parameter.dtype == torch.float32, parameter_name
        assert parameter.is_contiguous(), parameter_name
        assert parameter.grad is not None, parameter_name
        assert torch.isfinite(parameter.grad).all(), parameter_name


@pytest.mark.parametrize("name", MODELS.names())
def test_every_norm_is_the_one_asked_for_and_knows_its_name(name):
    module = narrow(name)
    found = norms_of(module)
    assert len(found) >= 3
    for layer_name, layer in found:
        assert spec_of(layer) == "l1"
        assert layer.layer_name == layer_name


@pytest.mark.parametrize("name", MODELS.names())
def test_no_norm_means_l2(name):
    module = create_model(name, num_classes=3, width=4)
    assert {spec_of(layer) for _, layer in norms_of(module)} == {"l2"}


@pytest.mark.parametrize("name", ["resnet8", "resnet56", "resnet18", "resnet50", "vgg11", "alexnet", "mnist"])
def test_equal_seeds_give_equal_weights_and_convolutions_after_he(name):
    torch.manual_seed(3)
    module = create_model(name, num_classes=10, width=16)
    torch.manual_seed(3)
    again = create_model(name, num_classes=10, width=16)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[key]), key
    for layer_name, layer in module.named_modules():
        if isinstance(layer, nn.Conv2d) and layer.weight.numel() > 2000:
            fan_out = layer.out_channels * math.prod(layer.kernel_size)
            assert layer.weight.std().item() == pytest.approx(math.sqrt(2 / fan_out), rel=0.1), layer_name
    *_, head = (layer for layer in module.modules() if isinstance(layer, nn.Linear))
    assert head.out_features == 10
    assert head.weight.std().item() == pytest.approx(0.01, rel=0.15)
    assert not head.bias.any()


def test_no_file_of_the_room_names_a_batch_norm_class():
    for file in FOLDER.glob("*.py"):
        assert "batchnorm" not in file.read_text().lower(), file.name


def test_the_room_and_its_names_import_no_torch():
    code = (
        "import sys; from norm_matters.models import MODELS; MODELS.names(); MODELS.check('resnet20');"
        "assert not {'torch', 'timm', 'torchvision', 'pydantic'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={"PYTHONPATH": str(FOLDER.parents[1])})


@pytest.mark.parametrize(
    ("name", "published", "options"),
    [
        ("resnet18", "resnet18", {}),
        ("resnet50", "resnet50", {}),
        pytest.param("vgg11", "vgg11_bn", {"head": "classic"}, marks=pytest.mark.slow),
    ],
)
def test_torchvisions_weights_load_and_give_its_scores(name, published, options):
    from norm_matters.core.torchvision import torchvision

    ours = create_model(name, num_classes=5, **options)
    theirs = torchvision.models.get_model(published, num_classes=5)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours.eval()(images), theirs.eval()(images), rtol=1e-4, atol=1e-5)


def test_deep_networks_have_torchvisions_names_and_shapes():
    from norm_matters.core.torchvision import torchvision

    with torch.device("meta"):
        for name in ("resnet34", "resnet101", "resnet152", "vgg13", "vgg16", "vgg19"):
            entry = MODELS.get(name)
            assert entry.published is not None
            theirs = torchvision.models.get_model(entry.published, num_classes=5)
            options = {"head": "classic"} if name.startswith("vgg") else {}
            ours = create_model(name, num_classes=5, **options)
            expected = {key: value.shape for key, value in theirs.state_dict().items()}
            assert {key: value.shape for key, value in ours.state_dict().items()} == expected, name


def test_depths_and_widths():
    module = create_model("resnet20", num_classes=10, width=16)
    layers = [layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d) and "down" not in name]
    assert len(layers) == 19  # and the linear layer
    assert [layer.out_channels for layer in layers[::6]] == [16, 16, 32, 64]
    assert (
        sum(parameter.numel() for parameter in create_model("resnet8", num_classes=10, in_channels=1).parameters())
        < 80e3
    )


def test_small_stem_keeps_the_size():
    module = narrow("resnet18", stem="small")
    assert module.min_input_size == 8
    assert module.get_submodule("layer1")(module.maxpool(module.conv1(torch.randn(1, 2, 16, 16)))).shape[2:] == (16, 16)
    assert narrow("resnet18").min_input_size == 32


def test_dropout_acts_in_training_only():
    module = create_model("resnet8", num_classes=4, in_channels=1, norm="l2", dropout=0.5).eval()
    images = torch.randn(4, 1, 8, 8)
    assert torch.equal(module(images), module(images))
    module.train()
    assert not torch.equal(module(images), module(images))


def test_fixed_grid():
    x = torch.randn(2, 3, 4, 4)
    assert FixedGrid(4)(x) is x
    torch.testing.assert_close(FixedGrid(2)(x), nn.functional.avg_pool2d(x, 2))
    assert FixedGrid(7)(x).shape == (2, 3, 7, 7)


@pytest.mark.parametrize(
    ("name", "smallest"), [("resnet8", 4), ("resnet18", 32), ("vgg11", 32), ("alexnet", 63), ("mnist", 16)]
)
def test_smaller_input_is_refused_by_name(name, smallest):
    config = ModelConfig(name=name, options={"width": 4})
    with pytest.raises(UserError, match=rf"data\.input_size.*too small for {name}.*{smallest}x{smallest}"):
        build_model(config, num_classes=3, in_channels=1, input_size=smallest - 1)
    built = build_model(config, num_classes=3, in_channels=1, input_size=smallest)
    assert built.module.training
    assert built.crop == "pad"


def test_what_is_built_says_how_it_is_trained():
    config = ModelConfig(name="resnet18", norm="topk:k=3", options={"width": 4})
    built = build_model(config, num_classes=3, in_channels=3, input_size=96)
    assert (built.regime, built.crop, built.converted) == ("resnet-imagenet", "inception", 0)
    assert (built.phases, built.input_transform, built.source, built.weights) == (None, None, None, None)
    assert {spec_of(layer) for _, layer in norms_of(built.module)} == {"topk:k=3"}


def test_trial_changes_nothing():
    config = ModelConfig(name="mnist", options={"width": 4})
    torch.manual_seed(1)
    untried = build_model(config, num_classes=3, in_channels=1, input_size=None).module
    state = torch.get_rng_state()
    torch.manual_seed(1)
    tried = build_model(config, num_classes=3, in_channels=1, input_size=28).module
    assert torch.equal(torch.get_rng_state(), state)
    for key, tensor in untried.state_dict().items():
        assert torch.equal(tensor, tried.state_dict()[key]), key


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet20", {"widht": 8}, r"model\.options\.widht: unknown option; did you mean 'width'\?"),
        ("resnet20", {"stem": "small"}, r"model\.options\.stem: unknown option; there are: width, dropout"),
        ("resnet18", {"stem": "tiny"}, r"model\.options\.stem: value 'tiny' is not valid: input should be 'imagenet'"),
        ("vgg11", {"head": 3}, r"model\.options\.head: value '3'"),
        ("resnet20", {"width": 0}, r"model\.options\.width: value '0'.*greater than or equal to 1"),
        ("resnet20", {"width": "16"}, r"model\.options\.width: value '16'.*integer"),
        ("resnet20", {"width": True}, r"model\.options\.width: value 'True'.*integer"),
        ("alexnet", {"dropout": 1.0}, r"model\.options\.dropout: value '1.0'.*less than 1"),
        ("resnt20", {}, r"unknown model 'resnt20'; did you mean 'resnet20'\?"),
    ],
)
def test_wrong_options_and_names(name, options, message):
    with pytest.raises(UserError, match=message):
        create_model(name, num_classes=3, **options)


def test_all_wrong_options_at_once():
    with pytest.raises(UserError) as caught:
        create_model("resnet18", num_classes=3, stem="x", width=-1, depth=3)
    assert len(caught.value.problems) == 3


def test_unknown_norm():
    with pytest.raises(UserError, match="did you mean 'topk'"):
        create_model("resnet8", num_classes=3, norm="topj")


def test_synchronised_norms_are_asked_of_batch_norms_only():
    config = ModelConfig(name="resnet8", norm="l1", sync_norm=True)
    module = build_model(config, num_classes=3, in_channels=1, input_size=8).module
    assert {spec_of(norm) for _, norm in norms_of(module)} == {"l1:sync=true"}
    config = ModelConfig(name="resnet8", norm="layer", sync_norm=True)
    with pytest.raises(UserError, match=r"model.sync_norm: 'true': .* takes no statistics over the batch"):
        build_model(config, num_classes=3, in_channels=1, input_size=8)


@pytest.mark.slow
def test_resnet8_with_l1_learns_the_digits():
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).view(-1, 1, 8, 8).sub(4.88).div(6.02)
    x, x_test, y, y_test = train_test_split(
        images, torch.tensor(labels), test_size=0.2, random_state=0, stratify=labels
    )
    torch.manual_seed(0)
    module = create_model("resnet8", num_classes=10, in_channels=1, norm="l1")
    epochs, batch = 15, 128
    steps = epochs * (len(x) // batch)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(epochs):
        for indices in torch.randperm(len(x)).split(batch)[: len(x) // batch]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x[indices]), y[indices]).backward()
            optimizer.step()
            schedule.step()
    with torch.no_grad():
        accuracy = (module.eval()(x_test).argmax(1) == y_test).float().mean().item()
    assert accuracy >= 0.97
