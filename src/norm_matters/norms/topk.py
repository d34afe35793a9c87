"""Top(k) batch norm: sigma from the k largest deviations (Hoffer et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import per_channel
from norm_matters.norms.constants import extreme_constant, paper_extreme_constant
from norm_matters.norms.scale import SCALE_OPTIONS, Deviations, Measure, ScaleNorm, accumulator, channel_sum
from norm_matters.norms.spec import Option


@dataclass(frozen=True)
class TopKStatistic:
    """sigma = constant * mean of the k largest |d|.

    Values that tie at the k-th place share its gradient equally, so that the result depends neither on their order
    nor on how a backend sorts.
    """

    constant: float
    k: int

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`; the extras are the k-th largest |d| and the share of one value that ties with it."""
        largest = _largest(torch.cat([_largest(_rows(d.abs_()), self.k) for d in deviations()], 1), self.k)
        threshold = largest.amin(1)
        tied = torch.stack([channel_sum(_tied(_compare(d, threshold))) for d in deviations()]).sum(0)
        share = (self.k - (largest > threshold[:, None]).sum(1)) / tied
        sigma = largest.mean(1, dtype=accumulator(largest)) * self.constant
        return Measure(sigma, torch.full_like(sigma, self.constant / self.k), (threshold, share))

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`."""
        threshold, share = extras
        sign = d.sign()
        order = _compare(d, threshold)
        weight = _tied(order).mul_(per_channel(share.to(d.dtype), d)).add_(order.relu_())
        return weight.mul_(sign)


def _rows(x: Tensor) -> Tensor:
    """(N, C, *) as (C, n)."""
    return x.transpose(0, 1).flatten(1)


def _largest(rows: Tensor, k: int) -> Tensor:
    """The k largest of each row, in any order; all of a shorter row."""
    return rows.topk(min(k, rows.shape[1]), sorted=False).values


def _compare(d: Tensor, threshold: Tensor) -> Tensor:
    """1 where |d| is above its channel's threshold, 0 where it equals it, -1 below; overwrites d."""
    return d.abs_().sub_(per_channel(threshold, d)).sign_()


def _tied(order: Tensor) -> Tensor:
    """1 where `_compare` gave 0, else 0. (In place of `order == 0`, which is slow on a CPU.)"""
    return order.abs().neg_().add_(1)


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

    def calibrated_constant(self, n: int) -> float:
        """See `ScaleNorm`."""
        return extreme_constant(index(n), min(self.k, index(n)))

    def paper_constant(self, n: int) -> float:
        """See `ScaleNorm`; the same for every k."""
        return paper_extreme_constant(n)

    def statistic(self, n: int, constant: float) -> TopKStatistic:
        """See `ScaleNorm`."""
        return TopKStatistic(constant, min(self.k, n))
