"""Train convolutional networks with the normalisation you choose, and know what it did.

The public functions and the rooms are imported at first use, so that importing the package stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from norm_matters.core.lazy import lazy_attributes

if TYPE_CHECKING:
    from norm_matters.engine.instruments.invariance import scale_invariant_weights
    from norm_matters.experiments import reproduce, sweep
    from norm_matters.inference import evaluate, load_run, predict
    from norm_matters.models import create_model
    from norm_matters.norms import (
        absorb_norm,
        calibrate_norm,
        convert_norm,
        create_norm,
        freeze_norm,
        fuse_activations,
        is_norm,
        saving_memory,
        sync_norm,
        unfreeze_norm,
    )
    from norm_matters.run import resume, train
    from norm_matters.weights import bound_weights, normalise_weights, remove_weight_norm

__all__ = [
    "absorb_norm",
    "bound_weights",
    "calibrate_norm",
    "convert_norm",
    "create_model",
    "create_norm",
    "evaluate",
    "freeze_norm",
    "fuse_activations",
    "is_norm",
    "load_run",
    "normalise_weights",
    "predict",
    "remove_weight_norm",
    "reproduce",
    "resume",
    "saving_memory",
    "scale_invariant_weights",
    "sweep",
    "sync_norm",
    "train",
    "unfreeze_norm",
]

_ROOMS = (
    "core",
    "datasets",
    "engine",
    "experiments",
    "models",
    "norms",
    "record",
    "regimes",
    "report",
    "transforms",
    "weights",
)
_name = lazy_attributes(
    __name__,
    {
        "engine.instruments.invariance": ("scale_invariant_weights",),
        "experiments": ("reproduce", "sweep"),
        "inference": ("evaluate", "load_run", "predict"),
        "models": ("create_model",),
        "norms": (
            "absorb_norm",
            "calibrate_norm",
            "convert_norm",
            "create_norm",
            "freeze_norm",
            "fuse_activations",
            "is_norm",
            "saving_memory",
            "sync_norm",
            "unfreeze_norm",
        ),
        "run": ("resume", "train"),
        "weights": ("bound_weights", "normalise_weights", "remove_weight_norm"),
    },
)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}") if name in _ROOMS else _name(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
