"""Batch normalisation by any estimate of sigma, with its analytic derivative.

With d = x - mean, r = 1 / sqrt(sigma^2 + eps), g the gradient of the output and S the sum over a channel's n values:

    dL/dweight = S(g d) r        dL/dbias = S(g)
    dL/dx_i = r w (g_i - S(g) / n) - r^2 sigma w (dL/dweight) (v_i - S(v) / n),    v = dsigma/dd

so a statistic has to give sigma and v only. Nothing but the input and numbers per channel is kept for the backward
pass; the output may be overwritten by an activation that works in place.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from norm_matters.norms.base import BATCH_OPTIONS, BatchwiseNorm, BatchOptions, all_but_channels, per_channel
from norm_matters.norms.spec import Option

SCALE_OPTIONS: Mapping[str, Option] = {
    "constant": Option("float", "calibrated", minimum=0, above=True, words=("calibrated", "paper")),
    **BATCH_OPTIONS,
}
Extras = tuple[Tensor, ...]


class Statistic(Protocol):
    """An estimate of sigma from deviations d of shape (N, C, *); both methods may overwrite d."""

    def measure(self, d: Tensor) -> tuple[Tensor, Extras]:
        """Return sigma (C,) and the numbers per channel that `slope` needs, all in `accumulator(d)`."""
        ...

    def slope(self, d: Tensor, sigma: Tensor, extras: Extras) -> tuple[Tensor, Tensor]:
        """Return u (N, C, *) and gain (C,) with dsigma/dd = gain u, d taken as independent of the mean."""
        ...


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over x, and numbers per channel, are kept in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def channel_sum(x: Tensor) -> Tensor:
    """Sum over all but the channels, accumulated in float32 or wider."""
    return x.sum(all_but_channels(x), dtype=accumulator(x))


def channel_count(x: Tensor) -> int:
    """The number n of values per channel."""
    return x.numel() // x.shape[1]


def normalise_by(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, *, eps: float, statistic: Statistic, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x (N, C, *) per channel by its mean and the statistic's sigma.

    Args:
        x: any layout.
        weight, bias: (C,) in `accumulator(x)`.
        eps: added to sigma squared.
        statistic: the estimate of sigma.
        dtype: of deviations and what the statistic makes of them.

    Returns:
        y (dtype and layout of x), mean (C,), sigma squared (C,); the last two carry no gradient.
    """
    return _NormaliseBy.apply(x, weight, bias, eps, statistic, dtype)  # type: ignore[return-value]


class _NormaliseBy(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        statistic: Statistic,
        dtype: torch.dtype,
    ) -> tuple[Tensor, Tensor, Tensor]:
        mean = channel_sum(x) / channel_count(x)
        sigma, extras = statistic.measure(_deviations(x, mean, dtype))
        var = sigma.square()
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, sigma, *extras)
        ctx.eps, ctx.statistic, ctx.dtype = eps, statistic, dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, sigma, *extras = ctx.saved_tensors
        var = sigma.square()
        # The derivative with mean and sigma held fixed, and the two sums over each channel, in one kernel.
        wide = accumulator(x)
        gain = torch.ones_like(mean) if weight is None else weight
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0].to(wide), x.to(wide), gain, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        u, scale = ctx.statistic.slope(_deviations(x, mean, ctx.dtype), sigma, tuple(extras))
        r = (var + ctx.eps).rsqrt()
        factor = -r.square() * sigma * gain * dweight * scale
        offset = -(r * gain * dbias + factor * channel_sum(u)) / channel_count(x)
        dx.addcmul_(u, per_channel(factor, x)).add_(per_channel(offset, x))
        return dx.to(x.dtype), None if weight is None else dweight, dbias, None, None, None


def _deviations(x: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) - per_channel(mean.to(dtype), x)


class ScaleOptions(BatchOptions, total=False):
    """Keyword arguments of the norms that estimate sigma by a constant times another statistic."""

    constant: float | Literal["calibrated", "paper"]


class ScaleNorm(BatchwiseNorm):
    """A batch norm with sigma = constant * (a statistic of the deviations).

    Args:
        num_features: channels C.
        constant: "calibrated": such that the output of Gaussian input has rms 1; "paper": the paper's; or a number.
        options: those of `BatchwiseNorm`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = SCALE_OPTIONS
    constant: float | Literal["calibrated", "paper"]

    @abc.abstractmethod
    def statistic(self, n: int) -> Statistic:
        """The estimate of sigma for n values per channel."""

    def normalise_batch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        statistic = self.statistic(channel_count(x))
        weight, bias = self.affine_in(accumulator(x))
        return normalise_by(x, weight, bias, eps=self.eps, statistic=statistic, dtype=self.compute_dtype(x))
