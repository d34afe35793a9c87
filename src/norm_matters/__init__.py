"""Train convolutional networks with the normalisation you choose, and know what it did.

The public functions and the rooms are imported at first use, so that importing the package stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from norm_matters.inference import evaluate, load_run, predict
    from norm_matters.models import create_model
    from norm_matters.norms import convert_norm, create_norm, is_norm
    from norm_matters.run import resume, train

__all__ = [
    "convert_norm",
    "create_model",
    "create_norm",
    "evaluate",
    "is_norm",
    "load_run",
    "predict",
    "resume",
    "train",
]

_HOMES = {
    "inference": ("evaluate", "load_run", "predict"),
    "models": ("create_model",),
    "norms": ("convert_norm", "create_norm", "is_norm"),
    "run": ("resume", "train"),
}
_ROOMS = ("core", "datasets", "engine", "models", "norms", "record", "regimes", "report", "transforms")


def __getattr__(name: str) -> Any:
    if name in _ROOMS:
        return importlib.import_module(f"{__name__}.{name}")
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module '{__name__}' has no attribute '{name}'")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
