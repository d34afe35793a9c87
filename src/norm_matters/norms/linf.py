"""Linf batch norm: sigma from the largest deviation (Hoffer et al. 2018)."""

from norm_matters.norms.constants import extreme_constant, paper_extreme_constant
from norm_matters.norms.scale import ScaleNorm
from norm_matters.norms.topk import TopKStatistic


class LinfNorm(ScaleNorm):
    """Batch norm with sigma = C_1(n) max|x - mean|: Top(k) with k = 1; arguments as in `ScaleNorm`."""

    name = "linf"

    def statistic(self, n: int) -> TopKStatistic:
        """See `ScaleNorm`."""
        if isinstance(self.constant, str):
            constant = paper_extreme_constant(n) if self.constant == "paper" else extreme_constant(n, 1)
        else:
            constant = self.constant
        return TopKStatistic(constant, 1)
