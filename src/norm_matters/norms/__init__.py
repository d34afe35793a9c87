"""Normalisation layers: one contract (base.py), one file per norm, and the text that names them (spec.py).

Importing this package imports no torch; the exported names are loaded on first use.
"""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.norms.base import Norm
    from norm_matters.norms.build import NormFactory, canonical_spec, check_spec, create_norm, norm_factory
    from norm_matters.norms.convert import ConversionReport, convert_norm
    from norm_matters.norms.query import has_spec, is_norm, name_norms, norms_of, spec_of
    from norm_matters.norms.sync import sync_norm

NORMS: "Registry[type[Norm]]" = Registry("norm")
NORMS.register("l2", "norm_matters.norms.l2:L2Norm", summary="batch norm by the standard deviation (nn.BatchNorm2d)")
NORMS.register("l1", "norm_matters.norms.l1:L1Norm", summary="batch norm by the mean absolute deviation")
NORMS.register("linf", "norm_matters.norms.linf:LinfNorm", summary="batch norm by the largest deviation")
NORMS.register("topk", "norm_matters.norms.topk:TopKNorm", summary="batch norm by the mean of the k largest deviations")
NORMS.register("lp", "norm_matters.norms.lp:LpNorm", summary="batch norm by the p-norm of the deviations")
NORMS.register("mean", "norm_matters.norms.mean:MeanNorm", summary="subtracts the batch mean only; adds a bias")
NORMS.register("rms", "norm_matters.norms.rms:RmsNorm", summary="batch norm by the root mean square, not centred")
NORMS.register("none", "norm_matters.norms.none:NoNorm", summary="no normalisation: the identity")
NORMS.register("group", "norm_matters.norms.imagewise:GroupNorm", summary="per image, over groups of channels")
NORMS.register("layer", "norm_matters.norms.imagewise:LayerNorm", summary="per image, over all channels and positions")
NORMS.register("instance", "norm_matters.norms.imagewise:InstanceNorm", summary="per image and channel")
NORMS.register("position", "norm_matters.norms.imagewise:PositionNorm", summary="per image and position, over channels")

__all__ = [
    "NORMS",
    "ConversionReport",
    "Norm",
    "NormFactory",
    "canonical_spec",
    "check_spec",
    "convert_norm",
    "create_norm",
    "has_spec",
    "is_norm",
    "name_norms",
    "norm_factory",
    "norms_of",
    "spec_of",
    "sync_norm",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "base": ("Norm",),
        "build": ("NormFactory", "canonical_spec", "check_spec", "create_norm", "norm_factory"),
        "convert": ("ConversionReport", "convert_norm"),
        "query": ("has_spec", "is_norm", "name_norms", "norms_of", "spec_of"),
        "sync": ("sync_norm",),
    },
)
