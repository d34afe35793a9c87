"""The formulas of weights in motion: turning angle, effective learning rate, equilibrium. Numpy, in float64.

Every quantity is made of four scalar products per vector, with w before a step, w' after it and d = w' - w.
"""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class SgdSettings:
    """The settings of `torch.optim.SGD` for one parameter, with torch's names."""

    lr: float
    momentum: float
    dampening: float
    nesterov: bool
    weight_decay: float


def turning_angle(ww: np.ndarray, wd: np.ndarray, dd: np.ndarray) -> np.ndarray:
    """The angle in radians, from 0 to pi, between w and w + d.

    From the part of d across w rather than from a cosine, which says nothing of angles below 1e-4 in float32.

    Args:
        ww, wd, dd: the scalar products (w, w), (w, d), (d, d), of any one shape.

    Returns:
        Angles of that shape; NaN where w or w + d is zero, which have no direction.
    """
    with np.errstate(divide="ignore", invalid="ignore"):
        across = np.sqrt(np.maximum(dd - wd * wd / ww, 0) * ww)
        along = ww + wd
        angle = np.arctan2(across, along)
    return np.where((ww > 0) & ((across != 0) | (along != 0)), angle, np.nan)


def effective_lr(settings: SgdSettings | None, ww: float) -> float:
    """The step size of the direction w / |w| under a norm: `lr (1 - dampening) / ((1 - momentum) |w|^2)`.

    Hoffer et al. 2018, section 3. A gradient reaches the weights 1 / (1 - momentum) times over the steps that follow,
    and that of a scale-invariant weight has the size 1 / |w|. It holds for SGD; others (None) give NaN.

    Args:
        ww: |w|^2 of the vector that the optimizer moves.
    """
    if settings is None or settings.momentum >= 1 or not ww > 0:
        return float("nan")
    return settings.lr * (1 - settings.dampening) / ((1 - settings.momentum) * ww)


def equilibrium_angle(settings: SgdSettings | None) -> float:
    """The angle per step, in radians, of a scale-invariant weight that decay shortens as much as gradients lengthen it.

    `sqrt(2 lr weight_decay / (1 + momentum))` for SGD with momentum (Wan et al. 2021, arXiv 2006.08419), times
    `sqrt(1 + 2 m - 2 m^3)` with Nesterov's, whose step repeats the newest gradient: in general the square is
    2 lr weight_decay (sum h^2) / (sum h), where h_k is the weight of the gradient of k steps ago in a step.
    To first order in lr weight_decay, for gradients that do not correlate over steps. NaN without decay, or where the
    optimizer is not SGD (None).
    """
    if settings is None or not settings.weight_decay > 0 or settings.momentum >= 1:
        return float("nan")
    m = settings.momentum
    shape = 1 + 2 * m - 2 * m**3 if settings.nesterov else 1.0
    lr = settings.lr * (1 - settings.dampening)
    return float(np.sqrt(2 * lr * settings.weight_decay * shape / (1 + m)))


def root_mean_square(values: np.ndarray) -> np.ndarray:
    """Over the first axis (steps): the mean by which an equilibrium of squared lengths is one of angles.

    NaN where there are no steps, or any of them has none.
    """
    if not len(values):
        return np.full(values.shape[1:], np.nan)
    return np.sqrt(np.square(values).mean(0))


def five_numbers(values: np.ndarray) -> np.ndarray:
    """Minimum, lower quartile, median, upper quartile and maximum (5,) of the values that are not NaN; else NaN."""
    known = values[~np.isnan(values)]
    if not len(known):
        return np.full(5, np.nan)
    return np.sort(known)[_ranks(len(known))]


def _ranks(n: int) -> np.ndarray:
    """The places of the five numbers among n sorted values: values that occur, so that infinite ones do no harm."""
    return np.round(np.linspace(0, n - 1, 5)).astype(int)
