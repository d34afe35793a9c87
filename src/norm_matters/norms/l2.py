"""L2 batch norm: `nn.BatchNorm2d` under the contract of base.py."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from norm_matters.norms.base import activate
from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.reduce import accumulator, channel_count
from norm_matters.norms.statistic import Deviations, Measure, Statistic, has_kernel


@dataclass(frozen=True)
class L2Statistic(Statistic):
    """sigma = sqrt(mean d^2), the squares kept in the dtype of d."""

    @property
    def estimator(self) -> Estimator:
        """See `Statistic`."""
        return Estimator("l2")

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`; the variance is rounded to the dtype of d, as the squares are."""
        total = deviations.sum(deviations.dense().square_())
        sigma = deviations.reducer.round(total / deviations.n).to(deviations.dtype).to(total.dtype).sqrt()
        return Measure(sigma, torch.where(sigma == 0, 0, 1 / (deviations.n * sigma)))

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`."""
        return d


class L2Norm(BatchwiseNorm):
    """Batch norm with the standard deviation: the numbers, names and state of `nn.BatchNorm2d`.

    It differs in two things: a batch that is not finite updates nothing, and any input (N, C, *) is taken.
    `running_var` is unbiased, as torch's. Arguments as in `BatchwiseNorm`.
    """

    name = "l2"

    def statistic_for(self, n: int) -> L2Statistic:
        """See the base class."""
        return L2Statistic()

    def normalise_batch(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        dtype = accumulator(x)
        reducer = self.reducer()
        statistic = self.statistic_for(channel_count(x))
        if self.compute_dtype(x) != dtype or not reducer.plain or has_kernel(x, statistic, dtype, reducer):
            return super().normalise_batch(x, residual, relu=relu)
        weight, bias = self.affine_in(dtype)
        # torch's kernel writes running statistics itself: it writes them here, with momentum 1, and the base class
        # commits them if they are finite. (Called directly: nn.functional.batch_norm refuses eps = 0 in training.)
        mean = torch.zeros(x.shape[1], dtype=dtype, device=x.device)
        var = torch.zeros_like(mean)
        y = torch.batch_norm(x, weight, bias, mean, var, True, 1.0, self.eps, torch.backends.cudnn.enabled)
        return activate(y, residual, relu=relu), mean, var

    def tracked(self, var: Tensor, n: int) -> Tensor:
        """See the base class."""
        return var * (n / (n - 1))

    def spread(self, n: int) -> float:
        """See the base class."""
        return 1 / math.sqrt(2 * (n - 1))
