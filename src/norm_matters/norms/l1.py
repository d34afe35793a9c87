"""L1 batch norm: sigma from the mean absolute deviation (Hoffer et al. 2018)."""

from dataclasses import dataclass

from torch import Tensor

from norm_matters.norms.constants import l1_constant
from norm_matters.norms.scale import Extras, ScaleNorm, channel_count, channel_sum


@dataclass(frozen=True)
class L1Statistic:
    """sigma = constant * mean|d|; its derivative is the sign of d, 0 at 0."""

    constant: float

    def measure(self, d: Tensor) -> tuple[Tensor, Extras]:
        """See `Statistic`."""
        return channel_sum(d.abs_()) * (self.constant / channel_count(d)), ()

    def slope(self, d: Tensor, sigma: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """See `Statistic`."""
        return d.sign_(), sigma.new_full(sigma.shape, self.constant / channel_count(d))


class L1Norm(ScaleNorm):
    """Batch norm with sigma = sqrt(pi/2) mean|x - mean|; arguments as in `ScaleNorm`.

    The paper's constant is the calibrated one: the mean absolute deviation of a Gaussian is sigma sqrt(2/pi).
    """

    name = "l1"

    def statistic(self, n: int) -> L1Statistic:
        """See `ScaleNorm`."""
        return L1Statistic(l1_constant() if isinstance(self.constant, str) else self.constant)
