"""Batch norm by the root mean square: nothing is subtracted."""

from dataclasses import dataclass

from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.l2 import L2Statistic


@dataclass(frozen=True)
class RmsStatistic(L2Statistic):
    """sigma = sqrt(mean x^2)."""

    centred = False


class RmsNorm(BatchwiseNorm):
    """Batch norm with sigma = sqrt(mean x^2) and no mean: `running_mean` stays 0. Arguments as in `BatchwiseNorm`.

    `position:statistic=rms` is the RMS norm of Zhang & Sennrich (2019).
    """

    name = "rms"

    def statistic_for(self, n: int) -> RmsStatistic:
        """See the base class."""
        return RmsStatistic()
