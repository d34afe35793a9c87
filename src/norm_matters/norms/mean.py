"""Mean-only batch norm, the companion of normalised weights (Salimans & Kingma 2016; Hoffer et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import activate, per_channel
from norm_matters.norms.batchwise import BATCH_OPTIONS, BatchwiseNorm
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.reduce import channel_count, channel_sum
from norm_matters.norms.spec import Option
from norm_matters.norms.statistic import Deviations, Measure, Statistic, has_kernel


@dataclass(frozen=True)
class UnitStatistic(Statistic):
    """sigma = 1, whatever the deviations."""

    @property
    def estimator(self) -> Estimator:
        """See `Statistic`."""
        return Estimator("mean")

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`."""
        return Measure(torch.ones_like(deviations.mean), None)

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`; never asked for."""
        raise AssertionError("sigma does not depend on the deviations")


class MeanNorm(BatchwiseNorm):
    """Subtracts the batch mean and adds a bias.

    Sigma is taken to be 1: `running_var` stays 1 and eps is 0. No weight unless asked for: after normalised weights a
    learned scale per channel would give back what the bound takes away.

    Args:
        num_features: channels C.
        scale: with `affine`, learn a weight per channel too.
        options: those of `BatchwiseNorm` but eps.
    """

    name = "mean"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "scale": Option("bool", False),
        **{key: option for key, option in BATCH_OPTIONS.items() if key != "eps"},
    }
    estimates_sigma = False
    scale: bool
    eps = 0.0

    def learns_weight(self) -> bool:
        """See the base class."""
        return self.scale

    def statistic_for(self, n: int) -> UnitStatistic:
        """See the base class."""
        return UnitStatistic()

    def spread(self, n: int) -> float:
        """See the base class."""
        return 0.0

    def normalise_batch(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class; without a kernel in torch's own operations, which can be differentiated twice."""
        dtype, reducer = self.compute_dtype(x), self.reducer()
        if not reducer.plain or has_kernel(x, UnitStatistic(), dtype, reducer):
            return super().normalise_batch(x, residual, relu=relu)
        mean = channel_sum(x) / channel_count(x)
        y = x.to(dtype) - per_channel(mean.to(dtype), x)
        weight, bias = self.affine_in(dtype)
        if weight is not None:
            y = y * per_channel(weight, x)
        if bias is not None:
            y = y + per_channel(bias, x)
        return activate(y.to(x.dtype), residual, relu=relu), mean.detach(), torch.ones_like(mean)
