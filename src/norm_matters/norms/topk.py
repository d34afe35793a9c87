"""Top(k) batch norm: sigma from the k largest deviations (Hoffer et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import all_but_channels, per_channel
from norm_matters.norms.constants import extreme_constant, paper_extreme_constant
from norm_matters.norms.scale import SCALE_OPTIONS, Extras, ScaleNorm, accumulator, channel_sum
from norm_matters.norms.spec import Option


@dataclass(frozen=True)
class TopKStatistic:
    """sigma = constant * mean of the k largest |d|.

    Values that tie at the k-th place share its gradient equally, so that the result depends neither on their order
    nor on how a backend sorts.
    """

    constant: float
    k: int

    def measure(self, d: Tensor) -> tuple[Tensor, Extras]:
        """See `Statistic`; the extras are the k-th largest |d| and how many are larger."""
        largest = d.abs_().transpose(0, 1).flatten(1).topk(self.k, sorted=False).values
        threshold = largest.amin(1)
        above = (largest > threshold[:, None]).sum(1)
        sigma = largest.mean(1, dtype=accumulator(d)) * self.constant
        return sigma, (threshold, above)

    def slope(self, d: Tensor, sigma: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """See `Statistic`."""
        threshold, above = (per_channel(values, d) for values in extras)
        size = d.abs()
        tied = size == threshold
        share = (self.k - above) / tied.sum(all_but_channels(d), keepdim=True)
        u = d.sign_().mul_(torch.where(tied, share.to(d.dtype), (size > threshold).to(d.dtype)))
        return u, sigma.new_full(sigma.shape, self.constant / self.k)


class TopKNorm(ScaleNorm):
    """Batch norm with sigma = C_k(n) * mean of the k largest |x - mean|; arguments as in `ScaleNorm`.

    Args:
        num_features: channels C.
        k: how many deviations; all of them where a channel has fewer values.
        options: those of `ScaleNorm`.
    """

    name = "topk"
    OPTIONS: ClassVar[Mapping[str, Option]] = {"k": Option("int", 10, minimum=1, shown=True), **SCALE_OPTIONS}
    k: int

    def statistic(self, n: int) -> TopKStatistic:
        """See `ScaleNorm`; the paper's constant is the same for every k."""
        k = min(self.k, n)
        if isinstance(self.constant, str):
            constant = paper_extreme_constant(n) if self.constant == "paper" else extreme_constant(n, k)
        else:
            constant = self.constant
        return TopKStatistic(constant, k)
