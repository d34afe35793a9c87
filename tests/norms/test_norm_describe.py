"""What is known of the norms of torch, timm and torchvision, against those libraries as they are."""

import importlib
import inspect
import pkgutil

import pytest
import torch
from torch import nn

import norm_matters.core.torchvision
from norm_matters.norms import create_norm, is_norm
from norm_matters.norms.describe import _CLASSES, _OTHERS, describe, kind_of

timm_layers = pytest.importorskip("timm.layers")

# Classes of timm.layers with a norm in their name that hold norms among other layers, or are none.
NO_NORMS = {
    "ConvNormAct",
    "ConvNormActAa",
    "SeparableConvNormAct",
    "NormMlpClassifierHead",
    "ClNormMlpClassifierHead",
    # adds to its input
    "GlobalResponseNorm",
    "GlobalResponseNormMlp",
}


def classes_of(package, *, named: str = "") -> dict[str, type]:
    """Module classes defined in a package, by name, those of its own modules only."""
    found = {}
    for info in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        module = importlib.import_module(info.name)
        for name, cls in vars(module).items():
            own = inspect.isclass(cls) and issubclass(cls, nn.Module) and cls.__module__ == module.__name__
            if own and named in name:
                found[name] = cls
    return found


def test_every_norm_of_timm_is_known():
    classes = classes_of(timm_layers, named="Norm") | classes_of(timm_layers, named="FilterResponse")
    assert len(classes) > 40
    unknown = {name for name, cls in classes.items() if not is_norm(cls.__new__(cls))}
    assert unknown == NO_NORMS


def test_every_norm_of_torch_is_known():
    classes = classes_of(torch.nn.modules, named="Norm") | classes_of(torch.nn.modules, named="LRN")
    unknown = {name for name, cls in classes.items() if not is_norm(cls.__new__(cls))}
    assert unknown == set()


def test_no_name_is_out_of_date():
    there = {f"torch.{name}" for name in classes_of(torch.nn.modules)}
    there |= {f"timm.{name}" for name in classes_of(timm_layers)}
    vision = norm_matters.core.torchvision.torchvision
    there |= {f"torchvision.{name}" for name in (classes_of(vision.models) | classes_of(vision.ops))}
    assert {*_CLASSES, *_OTHERS} <= there


@pytest.mark.parametrize(
    "module",
    [
        nn.Conv2d(1, 1, 1),
        nn.Sequential(nn.BatchNorm1d(2)),
        type("LayerNorm2d", (nn.Module,), {})(),
    ],
    ids=lambda module: type(module).__name__,
)
def test_what_is_no_norm_of_these_libraries(module):
    assert not is_norm(module)
    assert kind_of(module) is None


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        *(("l1", "batch"), ("mean", "batch"), ("group:groups=2", "group"), ("layer", "group")),
        *(("instance", "instance"), ("position", "layer"), ("position:statistic=rms", "rms"), ("none", None)),
    ],
)
def test_our_norms_have_kinds(spec, kind):
    assert kind_of(create_norm(spec, 4)) == kind


def test_a_frozen_network_of_timm():
    """As `freeze_batch_norm_2d` makes it, which sets more attributes than the class has."""
    frozen = timm_layers.freeze_batch_norm_2d(nn.Sequential(nn.BatchNorm2d(4), timm_layers.BatchNormAct2d(3, eps=0.5)))
    assert [kind_of(norm) for norm in frozen] == ["batch", "batch"]
    assert [describe(norm).options for norm in frozen] == [
        {"eps": 1e-5, "frozen": "all"},
        {"eps": 0.5, "frozen": "all"},
    ]
    assert [describe(norm).num_features for norm in frozen] == [4, 3]
