"""Batch normalisation by any estimate of sigma, with its analytic derivative.

With d = x - mean, r = 1 / sqrt(sigma^2 + eps), g the gradient of the output and S the sum over a channel's n values:

    dL/dweight = S(g d) r        dL/dbias = S(g)
    dL/dx_i = r w (g_i - S(g) / n) - r^2 sigma w (dL/dweight) (v_i - S(v) / n),    v = dsigma/dd

so a statistic has to give sigma and v only. Nothing but the input and numbers per channel is kept for the backward
pass; the output may be overwritten by an activation that works in place.
"""

import abc
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from norm_matters.norms.base import BATCH_OPTIONS, BatchOptions, BatchwiseNorm, all_but_channels, per_channel
from norm_matters.norms.spec import Option

SCALE_OPTIONS: Mapping[str, Option] = {
    "constant": Option("float", "calibrated", minimum=0, above=True, words=("calibrated", "paper")),
    **BATCH_OPTIONS,
}
# Elements per piece: a few pieces of float32 fit into a core's second-level cache (256 KiB each).
_PIECE = 1 << 16

Deviations = Callable[[], Iterable[Tensor]]


class Measure(NamedTuple):
    """What a statistic makes of a channel's deviations d; every tensor is (C,).

    Attributes:
        sigma: the estimate.
        gain: the part of dsigma/dd that is the same for a whole channel: dsigma/dd = gain u, with u from `slope`.
        extras: what `slope` needs to know.
    """

    sigma: Tensor
    gain: Tensor
    extras: tuple[Tensor, ...] = ()


class Statistic(Protocol):
    """An estimate of sigma from deviations, which come in pieces (some images, C, *) that may be overwritten."""

    def measure(self, deviations: Deviations) -> Measure:
        """Measure the deviations; `deviations()` goes through the pieces, as often as it is called."""
        ...

    def slope(self, d: Tensor, extras: tuple[Tensor, ...]) -> Tensor:
        """Return u of the shape of the piece d, with dsigma/dd = gain u, as if d did not depend on the mean."""
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
        sigma, gain, extras = statistic.measure(lambda: (_deviations(piece, mean, dtype) for piece in _pieces(x)))
        var = sigma.square()
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, sigma, gain, *extras)
        ctx.eps, ctx.statistic, ctx.dtype = eps, statistic, dtype
        ctx.mark_non_differentiable(mean, var)
        return y, mean, var

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, sigma, gain, *extras = ctx.saved_tensors
        var = sigma.square()
        wide = accumulator(x)
        scale = torch.ones_like(mean) if weight is None else weight
        # The derivative with mean and sigma held fixed, and the two sums over each channel, in one kernel.
        dx, dweight, dbias = torch.ops.aten.native_batch_norm_backward(
            grads[0].to(wide), x.to(wide), scale, mean, var, None, None, False, ctx.eps, [True, True, True]
        )
        r = (var + ctx.eps).rsqrt()
        factor = -r.square() * sigma * scale * dweight * gain
        total = torch.zeros_like(mean)
        for piece, dpiece in zip(_pieces(x), _pieces(dx), strict=True):
            u = ctx.statistic.slope(_deviations(piece, mean, ctx.dtype), tuple(extras))
            total += channel_sum(u)
            dpiece.addcmul_(u, per_channel(factor, x))
        dx -= per_channel((r * scale * dbias + factor * total) / channel_count(x), x)
        return dx.to(x.dtype), None if weight is None else dweight, dbias, None, None, None


def _deviations(x: Tensor, mean: Tensor, dtype: torch.dtype) -> Tensor:
    return x.to(dtype) - per_channel(mean.to(dtype), x)


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """x image by image, or several at a time, so that on a CPU what is computed from a piece stays in its cache.

    Elsewhere, and compiled (where elementwise operations are fused), x is one piece.
    """
    if x.device.type != "cpu" or torch.compiler.is_compiling():
        return (x,)
    return x.split(max(1, _PIECE * len(x) // x.numel()))


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
