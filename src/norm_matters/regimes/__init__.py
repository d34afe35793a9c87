"""Regimes: the optimizer and its settings as a function of the time in a run.

`phases.py` documents the language. A regime's name is known here without importing torch.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.regimes.build import build_regime
    from norm_matters.regimes.optimizers import RegimeOptimizer
    from norm_matters.regimes.plot import plot_lr
    from norm_matters.regimes.regime import Regime

__all__ = ["REGIMES", "Regime", "RegimeOptimizer", "build_regime", "check_regime", "plot_lr"]

NamedRegime = Callable[..., list[dict[str, Any]]]

REGIMES: Registry[NamedRegime] = Registry("regime")

for _name, _summary in {
    "resnet-cifar": "SGD, LR 0.1, a tenth at 50% and 75%; decay 1e-4 (He et al. 2016)",
    "resnet-imagenet": "SGD, LR 0.1, a tenth at each third; decay 1e-4 (He et al. 2016)",
    "vgg-cifar": "SGD, LR 0.1, a tenth at each quarter; decay 5e-4 (Hoffer et al. 2018)",
    "alexnet": "SGD, LR 0.01, a tenth at each quarter; decay 5e-4 (Krizhevsky et al. 2012)",
    "mnist": "SGD, LR 0.05, a tenth at 50% and 75%; decay 1e-4",
    "digits": "SGD, LR 0.1 along a cosine after a short warm-up; decay 5e-4",
    "cosine": "SGD, LR 0.1 along a cosine after a warm-up; decay 5e-4",
    "linear": "SGD, LR 0.1 along a line to 0; decay 5e-4",
    "constant": "SGD, LR 0.01 throughout; decay 5e-4",
    "adamw": "AdamW, LR 1e-3 along a cosine after a warm-up; decay 0.05, none on norms and biases",
}.items():
    REGIMES.register(_name, f"norm_matters.regimes.named:{_name.replace('-', '_')}", summary=_summary)


def check_regime(name: str) -> None:
    """Raise UserError with the nearest name unless `name` is a named regime; imports nothing."""
    REGIMES.check(name)


__getattr__ = lazy_attributes(
    __name__,
    {
        "build": ("build_regime",),
        "optimizers": ("RegimeOptimizer",),
        "plot": ("plot_lr",),
        "regime": ("Regime",),
    },
)
