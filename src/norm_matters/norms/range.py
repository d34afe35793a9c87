"""Range batch norm: sigma from the largest less the smallest value (Banner et al. 2018)."""

from dataclasses import dataclass
from operator import index

import torch
from torch import Tensor

from norm_matters.norms.base import per_channel
from norm_matters.norms.batchwise import ScaleNorm
from norm_matters.norms.constants import paper_range_constant, range_constant
from norm_matters.norms.spread import range_spread
from norm_matters.norms.statistic import Deviations, Measure, Statistic


@dataclass(frozen=True)
class RangeStatistic(Statistic):
    """sigma = constant * (max d - min d); values that tie at an end share its gradient equally."""

    constant: float

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`; the extras are the ends, and the share of one value at each."""
        highest, lowest = deviations.extremes()
        top, bottom = (deviations.reducer.round(end) for end in (highest, lowest))
        sigma = self.constant * (top - bottom).to(deviations.mean.dtype)
        # At least one is at each end, but for rounding that a compiler left out or a NaN.
        shares = [
            1 / deviations.count(_at_end(deviations.dense(), end)).clamp(min=1).to(sigma.dtype)
            for end in (highest, lowest)
        ]
        return Measure(sigma, torch.full_like(sigma, self.constant), (highest, lowest, *shares))

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`."""
        highest, lowest, *shares = extras
        top, bottom = (share.to(d.dtype) for share in shares)
        weight = _at_end(d.clone(), highest).mul_(per_channel(top, d))
        return weight.addcmul_(_at_end(d, lowest), per_channel(-bottom, d))


def _at_end(d: Tensor, end: Tensor) -> Tensor:
    """1 where d is the largest or the smallest of its channel, `end`, else 0; overwrites d.

    (In place of `d == end`, which is slow on a CPU.)
    """
    return d.sub_(per_channel(end, d)).sign_().abs_().neg_().add_(1)


class RangeNorm(ScaleNorm):
    """Batch norm with sigma = C(n) (max x - min x); arguments as in `ScaleNorm`.

    The released code takes the mean range of 16 chunks of the batch, in the order of memory. That is not offered: it
    depends on the order of the images and on how they are spread over ranks. `ghost:base=range` takes ranges of parts
    of the batch.
    """

    name = "range"

    def calibrated_constant(self, n: int) -> float:
        """See `ScaleNorm`."""
        return range_constant(index(n))

    def paper_constant(self, n: int) -> float:
        """See `ScaleNorm`; that of the publication: output of rms 0.55 to 0.65."""
        return paper_range_constant(n)

    def statistic(self, n: int, constant: float) -> RangeStatistic:
        """See `ScaleNorm`."""
        return RangeStatistic(constant)

    def spread(self, n: int) -> float:
        """See the base class."""
        return range_spread(n)
