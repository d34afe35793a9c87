"""Linf batch norm: sigma from the largest deviation (Hoffer et al. 2018)."""

from operator import index

from norm_matters.norms.batchwise import ScaleNorm
from norm_matters.norms.constants import extreme_constant, paper_extreme_constant
from norm_matters.norms.spread import extreme_spread
from norm_matters.norms.topk import TopKStatistic


class LinfNorm(ScaleNorm):
    """Batch norm with sigma = C_1(n) max|x - mean|: Top(k) with k = 1; arguments as in `ScaleNorm`."""

    name = "linf"

    def calibrated_constant(self, n: int) -> float:
        """See `ScaleNorm`."""
        return extreme_constant(index(n), 1)

    def paper_constant(self, n: int) -> float:
        """See `ScaleNorm`."""
        return paper_extreme_constant(n)

    def statistic(self, n: int, constant: float) -> TopKStatistic:
        """See `ScaleNorm`."""
        return TopKStatistic(constant, 1)

    def spread(self, n: int) -> float:
        """See the base class."""
        return extreme_spread(n, 1) or super().spread(n)
