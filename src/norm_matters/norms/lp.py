"""Lp batch norm: sigma from the p-th absolute moment (Hoffer et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import per_channel
from norm_matters.norms.batchwise import SCALE_OPTIONS, ScaleNorm
from norm_matters.norms.constants import moment_constant, paper_moment_constant
from norm_matters.norms.spec import Option
from norm_matters.norms.spread import moment_spread
from norm_matters.norms.statistic import Deviations, Measure, Statistic


@dataclass(frozen=True)
class LpStatistic(Statistic):
    """sigma = constant * (mean |d|^p)^(1/p).

    Powers are taken of |d| over its maximum, so that they neither overflow nor vanish, whatever the scale of d.
    """

    constant: float
    p: float

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`; the extra is the largest |d|, or 1 in a channel of zeros."""
        largest = deviations.largest()
        largest = torch.where(largest == 0, 1, largest)
        mean = deviations.sum(self._relative(deviations.dense(), largest).pow_(self.p)) / deviations.n
        sigma = self.constant * largest * mean.pow(1 / self.p)
        # A channel of zeros has no slope; 0^(1/p - 1) would make it infinite.
        gain = torch.where(mean == 0, 0, mean.pow(1 / self.p - 1)) * (self.constant / deviations.n)
        return Measure(sigma, gain, (largest,))

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`."""
        sign = d.sign()
        return self._relative(d, extras[0]).pow_(self.p - 1).mul_(sign)

    @staticmethod
    def _relative(d: Tensor, largest: Tensor) -> Tensor:
        """|d| over the largest of its channel, in place."""
        return d.abs_().div_(per_channel(largest, d))


class LpNorm(ScaleNorm):
    """Batch norm with sigma = C_p (mean |x - mean|^p)^(1/p); arguments as in `ScaleNorm`.

    Args:
        num_features: channels C.
        p: the power, from 1 to 100.
        options: those of `ScaleNorm`.
    """

    name = "lp"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "p": Option("float", 2.0, minimum=1, maximum=100, shown=True),
        **SCALE_OPTIONS,
    }
    p: float

    def calibrated_constant(self, n: int) -> float:
        """See `ScaleNorm`."""
        return moment_constant(index(n), self.p)

    def paper_constant(self, n: int) -> float:
        """See `ScaleNorm`; the limit of the calibrated one for large n."""
        return paper_moment_constant(self.p)

    def statistic(self, n: int, constant: float) -> LpStatistic:
        """See `ScaleNorm`."""
        return LpStatistic(constant, self.p)

    def spread(self, n: int) -> float:
        """See the base class."""
        return moment_spread(n, self.p) or super().spread(n)
