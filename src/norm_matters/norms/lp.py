"""Lp batch norm: sigma from the p-th absolute moment (Hoffer et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import all_but_channels, per_channel
from norm_matters.norms.constants import moment_constant, paper_moment_constant
from norm_matters.norms.scale import SCALE_OPTIONS, Extras, ScaleNorm, accumulator, channel_count, channel_sum
from norm_matters.norms.spec import Option


@dataclass(frozen=True)
class LpStatistic:
    """sigma = constant * (mean |d|^p)^(1/p).

    Powers are taken of |d| over its maximum, so that they neither overflow nor vanish, whatever the scale of d.
    """

    constant: float
    p: float

    def measure(self, d: Tensor) -> tuple[Tensor, Extras]:
        """See `Statistic`; the extras are the largest |d| and the mean of the scaled powers."""
        largest = d.abs_().amax(all_but_channels(d))
        power_mean = channel_sum(_relative(d, largest).pow_(self.p)) / channel_count(d)
        largest = largest.to(accumulator(d))
        return self.constant * largest * power_mean.pow(1 / self.p), (largest, power_mean)

    def slope(self, d: Tensor, sigma: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """See `Statistic`."""
        largest, power_mean = extras
        sign = d.sign()
        u = _relative(d.abs_(), largest.to(d.dtype)).pow_(self.p - 1).mul_(sign)
        # A constant channel has no slope; 0^(1/p - 1) would make it NaN.
        gain = torch.where(power_mean == 0, 0, power_mean.pow(1 / self.p - 1))
        return u, gain * (self.constant / channel_count(d))


def _relative(size: Tensor, largest: Tensor) -> Tensor:
    """Divide |d| by its largest in each channel, in place; 0 in a channel of zeros."""
    return size.div_(per_channel(torch.where(largest == 0, 1, largest), size))


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

    def statistic(self, n: int) -> LpStatistic:
        """See `ScaleNorm`; the paper's constant is the calibrated one's limit for large n."""
        if isinstance(self.constant, str):
            constant = paper_moment_constant(self.p) if self.constant == "paper" else moment_constant(n, self.p)
        else:
            constant = self.constant
        return LpStatistic(constant, self.p)
