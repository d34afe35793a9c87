"""Top(k) batch norm: sigma from the k largest deviations (Hoffer et al. 2018)."""

from collections.abc import Mapping
from dataclasses import dataclass
from operator import index
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import per_channel
from norm_matters.norms.batchwise import SCALE_OPTIONS, ScaleNorm
from norm_matters.norms.constants import extreme_constant, paper_extreme_constant
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.spec import Option
from norm_matters.norms.spread import extreme_spread
from norm_matters.norms.statistic import Deviations, Measure, Statistic


@dataclass(frozen=True)
class TopKStatistic(Statistic):
    """sigma = constant * mean of the k largest |d|.

    Values that tie at the k-th place share its gradient equally, so that the result depends neither on their order
    nor on how a backend sorts.
    """

    constant: float
    k: int

    @property
    def estimator(self) -> Estimator:
        """See `Statistic`."""
        return Estimator("topk", self.constant, self.k)

    def measure(self, deviations: Deviations) -> Measure:
        """See `Statistic`; the extras are the k-th largest |d| and the share of one value that ties with it."""
        values, places = _largest(deviations, self.k + 1)
        if deviations.reducer.group is not None:
            values = deviations.reducer.gather(values).sort(descending=True).values
        largest, threshold = values[:, : self.k], values[:, self.k - 1]
        sigma = self.constant / self.k * deviations.reducer.sum_gathered(largest)
        gain = torch.full_like(sigma, self.constant / self.k)
        # Places are kept for the backward pass: not where they would be many against the input.
        if deviations.reducer.plain and 8 * self.k <= deviations.n and _no_ties(values, self.k):
            return Measure(sigma, gain, peaks=places[:, : self.k])
        tied = deviations.count(_tied(_compare(deviations.dense(), threshold)))
        above = (largest > threshold[:, None]).sum(1)
        # At least one ties, but for rounding that a compiler left out or a NaN.
        return Measure(sigma, gain, (threshold, (self.k - above) / tied.clamp(min=1)))

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """See `Statistic`."""
        threshold, share = extras
        sign = d.sign()
        order = _compare(d, threshold)
        weight = _tied(order).mul_(per_channel(share.to(d.dtype), d)).add_(order.relu_())
        return weight.mul_(sign)


def _largest(deviations: Deviations, count: int) -> tuple[Tensor, Tensor]:
    """The `count` largest |d| of each channel in falling order, (C, count), and their places in the channel.

    They are all in the `count` images of the largest extent, so that only these are sorted. Fewer where n is less.
    """
    x = deviations.x
    rows = x.reshape(*x.shape[:2], -1)
    images = deviations.image_extents().topk(min(count, len(x)), dim=0).indices
    chosen = rows[images, torch.arange(x.shape[1], device=x.device)].transpose(0, 1)
    size = deviations.of(chosen, deviations.mean[:, None, None]).abs_().flatten(1)
    values, places = size.topk(min(count, size.shape[1]))
    pixels = rows.shape[2]
    return values, images.t().gather(1, places // pixels) * pixels + places % pixels


def _no_ties(values: Tensor, k: int) -> bool:
    """Whether in every channel the k-th largest of the values (C, k + 1) is above the next.

    Asked where the answer costs nothing: on a CPU, not compiled. Elsewhere ties are reckoned with.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    return values.shape[1] == k or bool((values[:, k - 1] > values[:, k]).all())


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

    def spread(self, n: int) -> float:
        """See the base class."""
        return (extreme_spread(n, self.k) if self.k < n else None) or super().spread(n)
