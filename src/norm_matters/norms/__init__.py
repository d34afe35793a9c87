"""Normalisation layers: one contract (base.py), one file per norm, and the text that names them (spec.py).

Importing this package imports no torch; the exported names are loaded on first use.
"""

from typing import TYPE_CHECKING

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.norms.absorb import AbsorptionReport, absorb_norm
    from norm_matters.norms.base import Norm
    from norm_matters.norms.build import NormFactory, canonical_spec, check_spec, create_norm, norm_factory
    from norm_matters.norms.calibrate import CalibrationReport, calibrate_norm
    from norm_matters.norms.convert import check_kinds, convert_norm, kinds_to_convert
    from norm_matters.norms.freeze import freeze_norm, unfreeze_norm
    from norm_matters.norms.fuse import fuse_activations, normalise_and_activate
    from norm_matters.norms.kernels.dispatch import available_backends, set_kernels
    from norm_matters.norms.memory import saving_memory
    from norm_matters.norms.query import (
        has_spec,
        is_norm,
        name_norms,
        norms_of,
        spec_of,
        takes_batch_statistics,
    )
    from norm_matters.norms.running import RunningStatistics
    from norm_matters.norms.selection import Report
    from norm_matters.norms.sync import sync_norm

NORMS: "Registry[type[Norm]]" = Registry("norm")
NORMS.register("l2", "norm_matters.norms.l2:L2Norm", summary="batch norm by the standard deviation (nn.BatchNorm2d)")
NORMS.register("l1", "norm_matters.norms.l1:L1Norm", summary="batch norm by the mean absolute deviation")
NORMS.register("linf", "norm_matters.norms.linf:LinfNorm", summary="batch norm by the largest deviation")
NORMS.register("topk", "norm_matters.norms.topk:TopKNorm", summary="batch norm by the mean of the k largest deviations")
NORMS.register("lp", "norm_matters.norms.lp:LpNorm", summary="batch norm by the p-norm of the deviations")
NORMS.register("mean", "norm_matters.norms.mean:MeanNorm", summary="subtracts the batch mean only; adds a bias")
NORMS.register("rms", "norm_matters.norms.rms:RmsNorm", summary="batch norm by the root mean square, not centred")
NORMS.register("range", "norm_matters.norms.range:RangeNorm", summary="batch norm by the largest less the smallest")
NORMS.register("ghost", "norm_matters.norms.ghost:GhostNorm", summary="any batch norm, over groups of images")
NORMS.register("smooth", "norm_matters.norms.smooth:SmoothNorm", summary="any batch norm, sigma smoothed over batches")
NORMS.register("renorm", "norm_matters.norms.renorm:RenormNorm", summary="any batch norm, corrected to evaluation's")
NORMS.register("noisy", "norm_matters.norms.noisy:NoisyNorm", summary="any batch norm, sigma as uncertain as another's")
NORMS.register("frozen", "norm_matters.norms.frozen:FrozenNorm", summary="l2 by its running statistics, not trained")
NORMS.register("timm", "norm_matters.norms.timm:TimmNorm", summary="a norm of timm's table: timm:frn, timm:evonorms0")
NORMS.register("none", "norm_matters.norms.none:NoNorm", summary="no normalisation: the identity")
NORMS.register("group", "norm_matters.norms.imagewise:GroupNorm", summary="per image, over groups of channels")
NORMS.register("layer", "norm_matters.norms.imagewise:LayerNorm", summary="per image, over all channels and positions")
NORMS.register("instance", "norm_matters.norms.imagewise:InstanceNorm", summary="per image and channel")
NORMS.register("position", "norm_matters.norms.imagewise:PositionNorm", summary="per image and position, over channels")

__all__ = [
    "NORMS",
    "AbsorptionReport",
    "CalibrationReport",
    "Norm",
    "NormFactory",
    "Report",
    "RunningStatistics",
    "absorb_norm",
    "available_backends",
    "calibrate_norm",
    "canonical_spec",
    "check_kinds",
    "check_spec",
    "convert_norm",
    "create_norm",
    "freeze_norm",
    "fuse_activations",
    "has_spec",
    "is_norm",
    "kinds_to_convert",
    "name_norms",
    "norm_factory",
    "normalise_and_activate",
    "norms_of",
    "saving_memory",
    "set_kernels",
    "spec_of",
    "sync_norm",
    "takes_batch_statistics",
    "unfreeze_norm",
]

__getattr__ = lazy_attributes(
    __name__,
    {
        "absorb": ("AbsorptionReport", "absorb_norm"),
        "base": ("Norm",),
        "build": ("NormFactory", "canonical_spec", "check_spec", "create_norm", "norm_factory"),
        "calibrate": ("CalibrationReport", "calibrate_norm"),
        "convert": ("check_kinds", "convert_norm", "kinds_to_convert"),
        "freeze": ("freeze_norm", "unfreeze_norm"),
        "fuse": ("fuse_activations", "normalise_and_activate"),
        "kernels.dispatch": ("available_backends", "set_kernels"),
        "memory": ("saving_memory",),
        "query": ("has_spec", "is_norm", "name_norms", "norms_of", "spec_of", "takes_batch_statistics"),
        "running": ("RunningStatistics",),
        "selection": ("Report",),
        "sync": ("sync_norm",),
    },
)
