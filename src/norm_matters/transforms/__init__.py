"""How images become the network's input: per image before batching, per batch on the device.

Importing this package imports no torch; its names are loaded at first use.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.transforms.preprocessing import Preprocessing

__all__ = ["TRANSFORMS", "Preprocessing"]

TRANSFORMS: Registry[Callable[..., Any]] = Registry("transform")
TRANSFORMS.register(
    "pad-crop",
    "norm_matters.transforms.batch:pad_crop",
    summary="per batch: pad with zeros, crop back at a random place (training, small images)",
)
TRANSFORMS.register(
    "flip", "norm_matters.transforms.batch:flip", summary="per batch: mirror half of the images (training)"
)
TRANSFORMS.register(
    "normalise", "norm_matters.transforms.batch:normalise", summary="per batch: bytes to float, mean 0, deviation 1"
)
TRANSFORMS.register(
    "cutout",
    "norm_matters.transforms.batch:cutout",
    summary="per batch: a square of each image set to the mean (training)",
)
TRANSFORMS.register(
    "inception-crop",
    "norm_matters.transforms.image:inception_crop",
    summary="per image: a random 8% to 100% of the area, resized (training, files)",
)
TRANSFORMS.register(
    "centre-crop",
    "norm_matters.transforms.image:centre_crop",
    summary="per image: resize the shorter side, crop the centre (evaluation, files)",
)


__getattr__ = lazy_attributes(__name__, {"preprocessing": ("Preprocessing",)})
