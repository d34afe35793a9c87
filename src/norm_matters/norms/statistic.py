"""Normalisation by any estimate of sigma, with its analytic derivative.

With d = x - mean, r = 1 / sqrt(sigma^2 + eps), g the gradient of the output and S the sum over a channel's n values:

    dL/dweight = S(g d) r        dL/dbias = S(g)
    dL/dx_i = r w (g_i - S(g) / n) - r^2 sigma w (dL/dweight) (v_i - S(v) / n),    v = dsigma/dd

so a statistic has to give sigma and v only. Where d is x itself (`centred` is false) the two terms over n are left out.
Nothing but the input and numbers per channel is kept for the backward pass; the output may be overwritten by an
activation that works in place. All sums go through a `Reducer`: in a distributed run n is the count of the whole batch.
"""

import abc
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from norm_matters.norms.base import activate, offer_output, per_channel
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.kernels.ops import kernel_for, normalise
from norm_matters.norms.memory import fetch, is_saving, keep
from norm_matters.norms.reduce import PLAIN, Reducer, accumulator, channel_sum


@dataclass(frozen=True)
class Deviations:
    """The deviations d = x - mean, computed anew whenever they are asked for.

    Attributes:
        x: (N, C, *).
        mean: (C,) in `accumulator(x)`.
        dtype: of d.
        n: values per channel, those of other ranks included.
        reducer: brings the numbers of a channel together.
    """

    x: Tensor
    mean: Tensor
    dtype: torch.dtype
    n: int
    reducer: Reducer = PLAIN

    def of(self, x: Tensor, mean: Tensor) -> Tensor:
        """x - mean in the dtype of the deviations."""
        return x.to(self.dtype) - mean.to(self.dtype)

    def dense(self) -> Tensor:
        """All deviations (N, C, *) of this rank, in the layout of x; the caller may overwrite them."""
        return self.of(self.x, per_channel(self.mean, self.x))

    def sum(self, values: Tensor) -> Tensor:
        """Sum values (N, C, *) made of the deviations per channel, (C,), those of other ranks included."""
        return self.reducer.sum(values)

    def count(self, ones: Tensor) -> Tensor:
        """Count the ones among zeros (N, C, *) per channel, (C,), exactly, those of other ranks included."""
        return self.reducer.share(channel_sum(ones))

    def image_extents(self) -> Tensor:
        """The largest |d| in each image and channel of this rank, (N, C)."""
        return torch.maximum(*(extreme.abs_() for extreme in self._image_extremes()))

    def largest(self) -> Tensor:
        """The largest |d| of each channel, (C,)."""
        return self.reducer.round(self.reducer.max(self.image_extents().amax(0)))

    def extremes(self) -> tuple[Tensor, Tensor]:
        """The largest and the smallest d of each channel, (C,)."""
        highest, lowest = self._image_extremes()
        return self.reducer.max(highest.amax(0)), -self.reducer.max(-lowest.amin(0))

    def _image_extremes(self) -> tuple[Tensor, Tensor]:
        """The largest and the smallest d in each image and channel, (N, C)."""
        return (
            self.of(_reduce_images(self.x, torch.amax), self.mean),
            self.of(_reduce_images(self.x, torch.amin), self.mean),
        )


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
        gain: the part of dsigma/dd that is the same for a whole channel (C,): dsigma/dd = gain u; None where sigma
            does not depend on d.
        extras: numbers per channel that `slope` needs.
        peaks: where u is +1 or -1 if it is 0 everywhere else: places in a channel (C, k); `slope` is not asked then.
    """

    sigma: Tensor
    gain: Tensor | None
    extras: tuple[Tensor, ...] = ()
    peaks: Tensor | None = None


class Statistic(abc.ABC):
    """An estimate of sigma from deviations.

    Attributes of the class:
        centred: whether the deviations are those from the mean; else they are x itself.
    """

    centred: ClassVar[bool] = True

    def __init_subclass__(cls, **options: Any) -> None:
        """A statistic made from another one, measuring something else, is not what the kernels know by its name."""
        super().__init_subclass__(**options)
        own = vars(cls)
        if "estimator" not in own and own.keys() & {"measure", "slope", "centred"}:
            cls.estimator = Statistic.estimator  # type: ignore[method-assign]

    @property
    def estimator(self) -> Estimator | None:
        """What the kernels call it; None where they do not know it."""
        return None

    @abc.abstractmethod
    def measure(self, deviations: Deviations) -> Measure:
        """Measure the deviations."""

    @abc.abstractmethod
    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """Return u (N, C, *), with dsigma/dd = gain u as if d did not depend on the mean; d may be overwritten."""


def normalise_by(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    eps: float,
    statistic: Statistic,
    dtype: torch.dtype,
    n: int,
    reducer: Reducer = PLAIN,
    residual: Tensor | None = None,
    relu: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalise x (N, C, *) per channel by its mean and the statistic's sigma, by a kernel where there is one.

    Args:
        x: any layout.
        weight, bias: (C,) in `accumulator(x)`.
        eps: added to sigma squared.
        statistic: the estimate of sigma.
        dtype: of deviations and what the statistic makes of them.
        n: values per channel, `reducer.count(x)`.
        reducer: brings the numbers of a channel together.
        residual: added to what was normalised; as x.
        relu: whether a ReLU comes last.

    Returns:
        y (dtype and layout of x), mean (C,), sigma squared (C,); the last two carry no gradient.
    """
    if has_kernel(x, statistic, dtype, reducer):
        assert statistic.estimator is not None
        y, stats = normalise(x, weight, bias, residual, statistic.estimator, eps=eps, relu=relu)
        return y, stats[0], stats[1].square()
    mean, measure = measure_by(x, statistic=statistic, dtype=dtype, n=n, reducer=reducer)
    y = normalise_measured(
        x, weight, bias, mean, measure, eps=eps, statistic=statistic, dtype=dtype, n=n, reducer=reducer
    )
    y = activate(y, residual, relu=relu)
    if is_saving():
        offer_measured(y, x, weight, bias, mean, measure.sigma, eps=eps, residual=residual, relu=relu)
    return y, mean, measure.sigma.square()


def offer_measured(
    y: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    sigma: Tensor,
    *,
    eps: float,
    residual: Tensor | None,
    relu: bool,
) -> None:
    """Let y be made again from what was measured: nothing is measured twice, drawn twice, or asked of other ranks."""
    x, weight, bias = (None if tensor is None else tensor.detach() for tensor in (x, weight, bias))  # type: ignore
    held = keep(residual)

    def make() -> Tensor:
        return activate(_normalise(x, weight, bias, mean, sigma, eps), fetch(held), relu=relu)

    offer_output(y, make, x, weight, bias)


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, sigma: Tensor, eps: float
) -> Tensor:
    return torch.nn.functional.batch_norm(x, mean, sigma.square(), weight, bias, False, 0.0, eps)


def has_kernel(x: Tensor, statistic: Statistic, dtype: torch.dtype, reducer: Reducer) -> bool:
    """Whether `normalise_by` would use a kernel."""
    return reducer.plain and dtype == accumulator(x) and kernel_for(x, statistic.estimator)


@torch.no_grad()
def measure_by(
    x: Tensor, *, statistic: Statistic, dtype: torch.dtype, n: int, reducer: Reducer = PLAIN
) -> tuple[Tensor, Measure]:
    """The first half of `normalise_by`: the mean (C,) of x and the measure of its deviations, both without gradient."""
    mean = reducer.round(reducer.sum(x) / n) if statistic.centred else x.new_zeros(x.shape[1], dtype=accumulator(x))
    measure = statistic.measure(Deviations(x, mean, dtype, n, reducer))
    return mean, measure._replace(sigma=reducer.round(measure.sigma))


def normalise_measured(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    measure: Measure,
    *,
    eps: float,
    statistic: Statistic,
    dtype: torch.dtype,
    n: int,
    reducer: Reducer = PLAIN,
) -> Tensor:
    """The second half of `normalise_by`: y, by what was measured, or by what was made of it (sigma and gain alike)."""
    sigma, gain, extras, peaks = measure
    return _Normalise.apply(  # type: ignore[return-value]
        x, weight, bias, mean, sigma, gain, peaks, eps, statistic, dtype, n, reducer, *extras
    )


class _Normalise(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        sigma: Tensor,
        gain: Tensor | None,
        peaks: Tensor | None,
        eps: float,
        statistic: Statistic,
        dtype: torch.dtype,
        n: int,
        reducer: Reducer,
        *extras: Tensor,
    ) -> Tensor:
        y = _normalise(x, weight, bias, mean, sigma, eps)
        ctx.save_for_backward(x, weight, mean, sigma, gain, peaks, *extras)
        ctx.eps, ctx.statistic, ctx.dtype, ctx.has_bias = eps, statistic, dtype, bias is not None
        ctx.n, ctx.reducer = n, reducer
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        x, weight, mean, sigma, gain, peaks, *extras = ctx.saved_tensors
        reducer: Reducer = ctx.reducer
        wide = accumulator(x)
        g, scale = grads[0].to(wide), torch.ones_like(mean) if weight is None else weight
        r = (sigma.square() + ctx.eps).rsqrt()
        deviations = Deviations(x, mean, ctx.dtype, ctx.n, reducer)
        dweight, dbias = _affine_gradients(ctx, x, g, scale, mean, sigma, r)
        # The gradients of weight and bias are this rank's; the input's depends on the whole batch.
        total_gd, total_g = reducer.share(torch.stack([dweight, dbias]))
        offset = -r * scale * total_g
        if gain is None:
            factor = u = places = None
        else:
            factor = -r.square() * sigma * scale * total_gd * gain
            places = None if peaks is None else _places(x, peaks)
            if places is None:
                u = ctx.statistic.slope(deviations.dense(), tuple(extras))
                offset -= factor * reducer.sum(u)
            else:
                u = deviations.of(x[places], mean[:, None]).sign()
                offset -= factor * u.sum(1, dtype=wide)
        # In the layout of x. (The compiler, which takes no `out` but contiguous ones, sees to that itself.)
        dx = None if torch.compiler.is_compiling() else torch.empty_like(x, dtype=wide)
        if ctx.statistic.centred:
            dx = torch.addcmul(per_channel(offset / ctx.n, x), g, per_channel(r * scale, x), out=dx)
        else:
            dx = torch.mul(g, per_channel(r * scale, x), out=dx)
        if factor is not None and u is not None:
            if places is None:
                dx.addcmul_(u, per_channel(factor, x))
            else:
                dx.index_put_(places, factor[:, None] * u, accumulate=True)
        affine = (dweight if weight is not None else None, dbias if ctx.has_bias else None)
        return dx.to(x.dtype), *affine, *[None] * (9 + len(extras))


def _affine_gradients(
    ctx: Any, x: Tensor, g: Tensor, scale: Tensor, mean: Tensor, sigma: Tensor, r: Tensor
) -> tuple[Tensor, Tensor]:
    """The gradients of weight and bias from this rank's part of the batch."""
    arithmetic = ctx.reducer.arithmetic
    if arithmetic is not None:
        d = Deviations(x, mean, g.dtype, ctx.n).dense()
        return arithmetic.sum(d.mul_(g)) * r, arithmetic.sum(g)
    # Both sums over each channel in one pass; torch's kernel takes them for the gradients of weight and bias.
    _, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
        g, x.to(g.dtype), scale, mean, sigma.square(), None, None, False, ctx.eps, [False, True, True]
    )
    return dweight, dbias


def _places(x: Tensor, peaks: Tensor) -> tuple[Tensor, ...]:
    """The indices into x (N, C, *) of places in the channels (C, k), which count images times positions."""
    image, *position = torch.unravel_index(peaks, (len(x), *x.shape[2:]))
    return (image, torch.arange(x.shape[1], device=x.device)[:, None], *position)
