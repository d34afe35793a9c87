"""The named regimes: functions to phases that count in percent of the run.

Each takes the starting learning rate and the weight decay; None means the regime's own.
"""

from fractions import Fraction
from typing import Any

from norm_matters.core.clock import Duration

Phases = list[dict[str, Any]]


def _sgd(*, lr: Any, weight_decay: float) -> dict[str, Any]:
    return {"epoch": 0, "optimizer": "SGD", "lr": lr, "momentum": 0.9, "weight_decay": weight_decay}


def _drops(lr: float, weight_decay: float, *starts: Fraction | int) -> Phases:
    """SGD with the LR a tenth of the former one from each start (in percent of the run) on."""
    later = [
        {"epoch": Duration(Fraction(start), "%"), "lr": lr / 10 ** (drop + 1)} for drop, start in enumerate(starts)
    ]
    return [_sgd(lr=lr, weight_decay=weight_decay), *later]


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def resnet_cifar(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """He et al. 2016, section 4.2: drops half way and at three quarters, decay 1e-4."""
    return _drops(_or(lr, 0.1), _or(weight_decay, 1e-4), 50, 75)


def resnet_imagenet(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """The usual 90 epochs of residual networks on ImageNet: drops at 30 and 60, decay 1e-4."""
    return _drops(_or(lr, 0.1), _or(weight_decay, 1e-4), Fraction(100, 3), Fraction(200, 3))


def vgg_cifar(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """Hoffer et al. 2018: drops every 20 of 80 epochs, decay 5e-4 on every parameter."""
    return _drops(_or(lr, 0.1), _or(weight_decay, 5e-4), 25, 50, 75)


def alexnet(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """Krizhevsky et al. 2012, section 5: LR 0.01 with three drops, decay 5e-4."""
    return _drops(_or(lr, 0.01), _or(weight_decay, 5e-4), 25, 50, 75)


def mnist(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """For small networks on small gray images."""
    return _drops(_or(lr, 0.05), _or(weight_decay, 1e-4), 50, 75)


def digits(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """For the 1,437 images of scikit-learn's digits: an epoch has a dozen steps, so the warm-up is a tenth."""
    schedule = {"schedule": "cosine", "from": _or(lr, 0.1), "to": 0.0, "warmup": "10%"}
    return [_sgd(lr=schedule, weight_decay=_or(weight_decay, 5e-4))]


def cosine(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """SGD along a cosine to 0 (Loshchilov and Hutter 2017, without restarts)."""
    schedule = {"schedule": "cosine", "from": _or(lr, 0.1), "to": 0.0, "warmup": "5%"}
    return [_sgd(lr=schedule, weight_decay=_or(weight_decay, 5e-4))]


def linear(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """SGD along a line to 0."""
    schedule = {"schedule": "linear", "from": _or(lr, 0.1), "to": 0.0}
    return [_sgd(lr=schedule, weight_decay=_or(weight_decay, 5e-4))]


def constant(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """SGD with one learning rate."""
    return [_sgd(lr=_or(lr, 0.01), weight_decay=_or(weight_decay, 5e-4))]


def adamw(lr: float | None = None, weight_decay: float | None = None) -> Phases:
    """AdamW along a cosine to 0; norms and biases are not decayed."""
    schedule = {"schedule": "cosine", "from": _or(lr, 1e-3), "to": 0.0, "warmup": "5%"}
    spared = {kind: {"weight_decay": 0.0} for kind in ("norm", "bias")}
    phase = {"epoch": 0, "optimizer": "AdamW", "lr": schedule, "weight_decay": _or(weight_decay, 0.05)}
    return [{**phase, "groups": spared}]
