"""A user's own file: the README's example of the original code, completed, and everything that can be wrong."""

import hashlib
import sys

import pytest
import torch
from torch import nn

from norm_matters.core.config import ModelConfig
from norm_matters.core.errors import UserError
from norm_matters.models import build_model, check_model
from norm_matters.models.trust import trust_file
from norm_matters.norms import spec_of

EXAMPLE = """
import torch.nn as nn
import torchvision.transforms as transforms


class Model(nn.Module):

    def __init__(self, num_classes=1000):
        super(Model, self).__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU(inplace=True),
            nn.Conv2d(8, 16, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, num_classes))

        self.regime = [
            {'epoch': 0, 'optimizer': 'SGD', 'lr': 1e-2,
                'weight_decay': 5e-4, 'momentum': 0.9},
            {'epoch': 15, 'lr': 1e-3, 'weight_decay': 0}
        ]

        self.input_transform = {
            'train': transforms.Compose([transforms.RandomHorizontalFlip(), transforms.ToTensor()]),
            'eval': transforms.Compose([transforms.ToTensor()])
        }

    def forward(self, inputs):
        return self.model(inputs)


def model(**kwargs):
    return Model()
"""

WIDE = EXAMPLE.replace("return Model()", "return Model(kwargs['num_classes'])")

PLAIN = """
from torch import nn

SEEN = []


def model(**kwargs):
    SEEN.append(kwargs)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
"""


def ours(module: nn.Module) -> list[str]:
    """The specs of our norms in it."""
    return [spec for layer in module.modules() if (spec := spec_of(layer))]


@pytest.fixture
def build(tmp_path):
    """Write a file and build the network in it."""

    def build(text: str, *, num_classes: int = 10, input_size: int | None = 16, **settings):
        path = tmp_path / "own.py"
        path.write_text(text)
        trust_file(path)
        config = ModelConfig(name=str(path), **settings)
        return build_model(config, num_classes=num_classes, in_channels=3, input_size=input_size)

    return build


def test_the_readmes_example_as_it_stands(build, tmp_path):
    with pytest.warns(UserWarning, match="1000 scores per image for 10 classes") as caught:
        built = build(EXAMPLE)
    assert len(caught) == 1
    assert built.phases == [
        {"epoch": 0, "optimizer": "SGD", "lr": 1e-2, "weight_decay": 5e-4, "momentum": 0.9},
        {"epoch": 15, "lr": 1e-3, "weight_decay": 0},
    ]
    assert set(built.input_transform) == {"train", "eval"}
    assert built.converted == 0
    assert not ours(built.module)
    path = tmp_path / "own.py"
    assert built.source == {"path": str(path), "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}


def test_its_norms_become_those_asked_for(build):
    built = build(WIDE, norm="l1")
    assert built.converted == 2
    assert ours(built.module) == ["l1", "l1"]
    assert not [layer for layer in built.module.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm)]
    built.module(torch.randn(4, 3, 8, 8)).sum().backward()


def test_one_step_of_training(build):
    module = build(WIDE, norm="topk:k=4").module
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    images, labels = torch.randn(32, 3, 16, 16), torch.arange(32) % 10
    losses = []
    for _ in range(12):
        loss = nn.functional.cross_entropy(module(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def test_the_function_gets_the_norm_only_when_given(build):
    def seen() -> dict:
        module = next(
            m for name, m in sys.modules.items() if name.startswith("_norm_matters_user") and hasattr(m, "SEEN")
        )
        return module.SEEN[-1]

    build(PLAIN)
    assert seen() == {"num_classes": 10, "in_channels": 3}
    build(PLAIN, norm="topk:k=10", options={"depth": 3})
    assert seen() == {"num_classes": 10, "in_channels": 3, "depth": 3, "norm": "topk:k=10"}


@pytest.mark.parametrize("norm", ["linf", "group:groups=4"])
def test_file_that_builds_the_norm_itself(build, norm):
    text = PLAIN.replace("nn.BatchNorm2d(8)", "create_norm(kwargs['norm'], 8)")
    built = build("from norm_matters.norms import create_norm\n" + text, norm=norm)
    assert ours(built.module) == [norm]


@pytest.mark.parametrize(
    "norm_layer",
    [
        "nn.Identity()",
        "nn.LocalResponseNorm(2)",
        "nn.Sequential(create_norm('l1', 8), type('Mine', (nn.BatchNorm2d,), {'forward': lambda self, x: x})(8))",
    ],
)
def test_no_norm_of_that_spec_is_an_error(build, norm_layer):
    with pytest.raises(UserError, match=r"model\.norm: 'l1'"):
        build(
            "from norm_matters.norms import create_norm\n" + PLAIN.replace("nn.BatchNorm2d(8)", norm_layer), norm="l1"
        )


def test_function_without_kwargs_gets_what_it_names(build):
    text = PLAIN.replace("**kwargs", "num_classes, depth=1").replace("SEEN.append(kwargs)", "assert depth == 2")
    build(text, options={"depth": 2}, norm="l1")
    with pytest.raises(UserError, match=r"model\.options\.deph: .*did you mean 'depth'"):
        build(text, options={"deph": 2})


def test_fewer_outputs_than_classes(build):
    with pytest.raises(UserError, match="gives 10 scores per image for 12 classes"):
        build(PLAIN, num_classes=12)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x = 1\n", "defines no function 'model'"),
        ("x = (\n", r"own\.py:1: SyntaxError"),
        ("import torch\n\nimport no_such_thing\n", r"own\.py:3: ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def model(**kwargs):\n    return 1 / 0\n", r"own\.py:2: ZeroDivisionError"),
        ("def model(**kwargs):\n    return 3\n", "returned int, which is no torch module"),
        ("raise SystemExit('no')\n", r"own\.py:1: SystemExit: no"),
        ("model = None\n", "defines no function 'model'"),
        (PLAIN.replace("nn.Flatten(), ", ""), r"fails on 3x16x16 images: .*own\.py"),
        (PLAIN.replace(", nn.Linear(8, 10)", "").replace("nn.Flatten()", "nn.Identity()"), r"gives \(2, 8, 1, 1\)"),
        (EXAMPLE.replace("'eval': ", "'test': "), "'input_transform' in .* must be a dict of two functions"),
        (EXAMPLE.replace("self.regime", "self.criterion"), "sets 'criterion', which is not supported yet"),
        ("\0", r"own\.py.*(SyntaxError|ValueError)"),
    ],
)
def test_what_can_be_wrong_in_a_file(build, text, message):
    with pytest.raises(UserError, match=message) as caught:
        build(text)
    assert len(caught.value.problems) == 1
    assert "\n" not in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"there is no file '.*none\.py'"):
        check_model(str(tmp_path / "none.py"))
    with pytest.raises(UserError, match="there is no file"):
        check_model(str(tmp_path / "folder.py"))


def test_no_published_weights(build):
    with pytest.raises(UserError, match=r"model\.pretrained"):
        build(PLAIN, pretrained=True)


def test_trial_leaves_the_file_its_modes_and_the_random_state(build):
    text = PLAIN.replace("return nn.Seq", "import torch\n    torch.manual_seed(5)\n    return nn.Seq")
    text = text.replace("nn.BatchNorm2d(8)", "nn.BatchNorm2d(8).eval(), nn.Dropout(0.5)")
    untried = build(text, input_size=None)
    state = torch.get_rng_state()
    tried = build(text)
    assert torch.equal(torch.get_rng_state(), state)
    modes = [layer.training for layer in tried.module.modules()]
    assert modes == [layer.training for layer in untried.module.modules()]
    assert len(set(modes)) == 2
