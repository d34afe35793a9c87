"""Train convolutional networks with the normalisation you choose, and know what it did.

The public functions and the rooms are imported at first use, so that importing the package stays quick.
"""

import importlib
from typing import TYPE_CHECKING, Any

from norm_matters.core.lazy import lazy_attributes

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

_ROOMS = ("core", "datasets", "engine", "models", "norms", "record", "regimes", "report", "transforms")
_name = lazy_attributes(
    __name__,
    {
        "inference": ("evaluate", "load_run", "predict"),
        "models": ("create_model",),
        "norms": ("convert_norm", "create_norm", "is_norm"),
        "run": ("resume", "train"),
    },
)


def __getattr__(name: str) -> Any:
    return importlib.import_module(f"{__name__}.{name}") if name in _ROOMS else _name(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
