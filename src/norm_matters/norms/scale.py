"""Batch normalisation by any estimate of sigma, with its analytic derivative.

With d = x - mean, r = 1 / sqrt(sigma^2 + eps), g the gradient of the output and S the sum over a channel's n values:

    dL/dweight = S(g d) r        dL/dbias = S(g)
    dL/dx_i = r w (g_i - S(g) / n) - r^2 sigma w (dL/dweight) (v_i - S(v) / n),    v = dsigma/dd

so a statistic has to give sigma and v only. Nothing but the input and numbers per channel is kept for the backward
pass; the output may be overwritten by an activation that works in place.
"""

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from norm_matters.norms.base import BATCH_OPTIONS, BatchwiseNorm, all_but_channels, per_channel
from norm_matters.norms.spec import Option

SCALE_OPTIONS: Mapping[str, Option] = {
    "constant": Option("float", "calibrated", minimum=0, above=True, words=("calibrated", "paper")),
    **BATCH_OPTIONS,
}


def accumulator(x: Tensor) -> torch.dtype:
    """The dtype that sums over x, and numbers per channel, are kept in: float32 or wider."""
    return torch.promote_types(x.dtype, torch.float32)


def channel_sum(x: Tensor) -> Tensor:
    """Sum over all but the channels, accumulated in float32 or wider."""
    return x.sum(all_but_channels(x), dtype=accumulator(x))


def channel_count(x: Tensor) -> int:
    """The number n of values per channel."""
    return x.numel() // x.shape[1]


@dataclass(frozen=True)
class Deviations:
    """The deviations d = x - mean, computed anew whenever they are asked for.

    Attributes:
        x: (N, C, *).
        mean: (C,) in `accumulator(x)`.
        dtype: of d.
    """

    x: Tensor
    mean: Tensor
    dtype: torch.dtype

    @property
    def n(self) -> int:
        """Values per channel."""
        return channel_count(self.x)

    def of(self, x: Tensor, mean: Tensor) -> Tensor:
        """x - mean in the dtype of the deviations."""
        return x.to(self.dtype) - mean.to(self.dtype)

    def dense(self) -> Tensor:
        """All deviations (N, C, *), in the layout of x; the caller may overwrite them."""
        return self.of(self.x, per_channel(self.mean, self.x))

    def image_extents(self) -> Tensor:
        """The largest |d| in each image and channel, (N, C)."""
        extremes = [self.of(_reduce_images(self.x, reduce), self.mean).abs_() for reduce in (torch.amax, torch.amin)]
        return torch.maximum(*extremes)


def _reduce_images(x: Tensor, reduce: Callable[..., Tensor]) -> Tensor:
    """Reduce (N, C, *) to (N, C)."""
    rows = x.reshape(*x.shape[:2], -1)
    count, channels, pixels = rows.shape
    if rows.stride(1) == 1 and channels < 32 and pixels % 32 == 0:
        # torch reduces over a few channels-last channels one by one: take 32 pixels for one at first.
        wide = rows.transpose(1, 2).reshape(count, pixels // 32, 32 * channels)
        return reduce(reduce(wide, 1).view(count, 32, channels), 1)
    return reduce(rows, 2)


class Measure(NamedTuple):
    """What a statistic makes of a channel's deviations d.

    Attributes:
        sigma: the estimate (C,).
        gain: the part of dsigma/dd that is the same for a whole channel (C,): dsigma/dd = gain u.
        extras: numbers per channel that `slope` needs.
        peaks: where u is +1 or -1 if it is 0 everywhere else: places in a channel (C, k); `slope` is not asked then.
    """

    sigma: Tensor
    gain: Tensor
    extras: tuple[Tensor, ...] = ()
    peaks: Tensor | None = None


class Statistic(Protocol):
    """An estimate of sigma from deviations."""

    def measure(self, deviations: Deviations) -> Measure:
        """Measure the deviations."""
        ...

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """Return u (N, C, *), with dsigma/dd = gain u as if d did not depend on the mean; d may be overwritten."""
        ...


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
        sigma, gain, extras, peaks = statistic.measure(Deviations(x, mean, dtype))
        var = sigma.square()
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, sigma, gain, peaks, *extras)
        ctx.eps, ctx.statistic, ctx.dtype, ctx.has_bias = eps, statistic, dtype, bias is not None
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, sigma, gain, peaks, *extras = ctx.saved_tensors
        wide = accumulator(x)
        g, scale = grads[0].to(wide), torch.ones_like(mean) if weight is None else weight
        # Both sums over each channel in one pass; torch's kernel takes them for the gradients of weight and bias.
        _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            g, x.to(wide), scale, mean, sigma.square(), None, None, False, ctx.eps, [False, True, True]
        )
        r = (sigma.square() + ctx.eps).rsqrt()
        factor = -r.square() * sigma * scale * dweight * gain
        deviations = Deviations(x, mean, ctx.dtype)
        places = None if peaks is None else _places(x, peaks)
        if places is None:
            u = ctx.statistic.slope(deviations.dense(), tuple(extras))
            total = channel_sum(u)
        else:
            u = deviations.of(x[places], mean[:, None]).sign()
            total = u.sum(1, dtype=wide)
        offset = -(r * scale * dbias + factor * total) / channel_count(x)
        dx = torch.empty_like(x, dtype=wide)
        torch.addcmul(per_channel(offset, x), g, per_channel(r * scale, x), out=dx)
        if places is None:
            dx.addcmul_(u, per_channel(factor, x))
        else:
            dx.index_put_(places, factor[:, None] * u, accumulate=True)
        affine = (dweight if weight is not None else None, dbias if ctx.has_bias else None)
        return dx.to(x.dtype), *affine, None, None, None


def _places(x: Tensor, peaks: Tensor) -> tuple[Tensor, ...]:
    """The indices into x (N, C, *) of places in the channels (C, k), which count images times positions."""
    image, *position = torch.unravel_index(peaks, (len(x), *x.shape[2:]))
    return (image, torch.arange(x.shape[1], device=x.device)[:, None], *position)


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
    def calibrated_constant(self, n: int) -> float:
        """The constant that gives Gaussian input, n values per channel, an output of rms 1."""

    @abc.abstractmethod
    def paper_constant(self, n: int) -> float:
        """The paper's constant for n values per channel."""

    @abc.abstractmethod
    def statistic(self, n: int, constant: float) -> Statistic:
        """The estimate of sigma for n values per channel."""

    def normalise_batch(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        n = channel_count(x)
        if isinstance(self.constant, str):
            constant = self.paper_constant(n) if self.constant == "paper" else self.calibrated_constant(n)
        else:
            constant = self.constant
        statistic = self.statistic(n, constant)
        weight, bias = self.affine_in(accumulator(x))
        return normalise_by(x, weight, bias, eps=self.eps, statistic=statistic, dtype=self.compute_dtype(x))
