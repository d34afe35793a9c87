"""Normalised weights: torch parametrizations that give a layer's weight a fixed or learned length.

A new one is one file with a `WeightNorm` and one `register` line below. Importing this package imports no torch.
"""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.weights.base import WeightNorm
    from norm_matters.weights.build import canonical_weight_norm, check_weight_norm
    from norm_matters.weights.layers import last_layer
    from norm_matters.weights.projected import project, projected_weights
    from norm_matters.weights.wrap import (
        bound_weights,
        initialise_weight,
        normalise_weights,
        remove_weight_norm,
        weight_norms_of,
    )

_ROOM = "norm_matters.weights"

WEIGHT_NORMS: "Registry[type[WeightNorm]]" = Registry("weight norm")
WEIGHT_NORMS.register(
    "bounded", f"{_ROOM}.bounded:BoundedWeightNorm", summary="one fixed norm for all channels of a layer (the paper's)"
)
WEIGHT_NORMS.register(
    "projected", f"{_ROOM}.projected:ProjectedWeightNorm", summary="a plain weight, put back to its norm after a step"
)
WEIGHT_NORMS.register(
    "weight", f"{_ROOM}.learned:LearnedWeightNorm", summary="a learned norm per channel (Salimans & Kingma 2016)"
)
WEIGHT_NORMS.register(
    "standardised", f"{_ROOM}.standardised:StandardisedWeight", summary="mean 0, variance 1 per channel (Qiao et al.)"
)

__all__ = [
    "WEIGHT_NORMS",
    "WeightNorm",
    "bound_weights",
    "canonical_weight_norm",
    "check_weight_norm",
    "initialise_weight",
    "last_layer",
    "normalise_weights",
    "project",
    "projected_weights",
    "remove_weight_norm",
    "weight_norms_of",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "base": ("WeightNorm",),
        "build": ("canonical_weight_norm", "check_weight_norm"),
        "layers": ("last_layer",),
        "projected": ("project", "projected_weights"),
        "wrap": (
            "bound_weights",
            "initialise_weight",
            "normalise_weights",
            "remove_weight_norm",
            "weight_norms_of",
        ),
    },
)
