"""L1 batch norm: sigma from the mean absolute deviation (Hoffer et al. 2018)."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from norm_matters.norms.batchwise import ScaleNorm
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.spread import moment_spread
from norm_matters.norms.statistic import Deviations, Measure, Statistic


@dataclass(frozen=True)
class L1Statistic(Statistic):
    """sigma = constant * mean|d|; its derivative is the sign of d, 0 at 0."""

    constant: float

    @property
    def estimator(self) -> Estimator:
        """See `Statistic`."""
        return Estimator("l1", self.constant)

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`."""
        gain = self.constant / deviations.n
        sigma = gain * deviations.sum(deviations.dense().abs_())
        return Measure(sigma, torch.full_like(sigma, gain))

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`."""
        return d.sign_()


class L1Norm(ScaleNorm):
    """Batch norm with sigma = sqrt(pi/2) mean|x - mean|; arguments as in `ScaleNorm`.

    The paper's constant is the calibrated one: the mean absolute deviation of a Gaussian is sigma sqrt(2/pi).
    """

    name = "l1"

    def calibrated_constant(self, n: int) -> float:
        """See `ScaleNorm`."""
        return math.sqrt(math.pi / 2)

    def statistic(self, n: int, constant: float) -> L1Statistic:
        """See `ScaleNorm`."""
        return L1Statistic(constant)

    def spread(self, n: int) -> float:
        """See the base class."""
        return moment_spread(n, 1.0) or super().spread(n)
