"""Networks by name: our own families, timm's and torchvision's, and the user's own files.

A new network of ours is one file with a `ModelEntry` and one `register` line below.
"""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.models.build import BuiltModel, build_model, check_model, create_model
    from norm_matters.models.entry import ModelEntry, Network
    from norm_matters.models.libraries import library_models

__all__ = [
    "MODELS",
    "BuiltModel",
    "ModelEntry",
    "Network",
    "build_model",
    "check_model",
    "create_model",
    "library_models",
]

_ROOM = "norm_matters.models"

MODELS: "Registry[ModelEntry]" = Registry("model")
MODELS.register("resnet8", f"{_ROOM}.resnet:resnet8", summary="8 layers, 78 thousand weights: for the digits")
MODELS.register("resnet20", f"{_ROOM}.resnet:resnet20", summary="20 layers, for small images such as CIFAR's")
MODELS.register("resnet32", f"{_ROOM}.resnet:resnet32", summary="32 layers, for small images")
MODELS.register("resnet44", f"{_ROOM}.resnet:resnet44", summary="44 layers, for small images")
MODELS.register("resnet56", f"{_ROOM}.resnet:resnet56", summary="56 layers, for small images")
MODELS.register("resnet110", f"{_ROOM}.resnet:resnet110", summary="110 layers, for small images")
MODELS.register("resnet18", f"{_ROOM}.resnet:resnet18", summary="18 layers, ImageNet; stem=small for images up to 64")
MODELS.register("resnet34", f"{_ROOM}.resnet:resnet34", summary="34 layers, ImageNet; stem=small for images up to 64")
MODELS.register("resnet50", f"{_ROOM}.resnet:resnet50", summary="50 layers, bottlenecks, ImageNet")
MODELS.register("resnet101", f"{_ROOM}.resnet:resnet101", summary="101 layers, bottlenecks, ImageNet")
MODELS.register("resnet152", f"{_ROOM}.resnet:resnet152", summary="152 layers, bottlenecks, ImageNet")
MODELS.register("vgg11", f"{_ROOM}.vgg:vgg11", summary="8 convolutions and a linear layer; head=classic for ImageNet's")
MODELS.register("vgg13", f"{_ROOM}.vgg:vgg13", summary="10 convolutions and a linear layer")
MODELS.register("vgg16", f"{_ROOM}.vgg:vgg16", summary="13 convolutions and a linear layer")
MODELS.register("vgg19", f"{_ROOM}.vgg:vgg19", summary="16 convolutions and a linear layer")
MODELS.register(
    "alexnet", f"{_ROOM}.alexnet:alexnet", summary="AlexNet in one column, with norms; images of 63 or more"
)
MODELS.register("mnist", f"{_ROOM}.mnist:mnist", summary="two convolutions and two linear layers, for 28 x 28 digits")

__getattr__ = lazy_attributes(
    __name__,
    {
        "build": ("BuiltModel", "build_model", "check_model", "create_model"),
        "entry": ("ModelEntry", "Network"),
        "libraries": ("library_models",),
    },
)
