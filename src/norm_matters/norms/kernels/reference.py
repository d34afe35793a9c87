"""The kernels' contract in plain torch, for any dtype, device and layout: what the other backends are tested against.

Everything here can be differentiated: `backward`, given statistics that carry gradients, gives second derivatives.
"""

import torch
from torch import Tensor

from norm_matters.norms.kernels.estimator import Estimator

STATS = ("mean", "sigma", "slope_sum", "threshold", "share")
"""The rows of `stats`; the last two of `topk` only."""


def reason_against(x: Tensor, estimator: Estimator) -> str | None:
    """None: nothing speaks against it."""
    return None


def forward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
) -> tuple[Tensor, Tensor]:
    """Normalise x and, where asked, add a residual and apply a ReLU.

    Args:
        x: (N, C, *), two or more values per channel.
        weight, bias: (C,), or None for ones and zeros.
        residual: as x, or None.
        estimator: of sigma.
        eps: added to sigma squared.
        relu: whether max(., 0) comes last.

    Returns:
        y (shape, dtype and layout of x), and the statistics (5, C), float32 or wider: rows as in `STATS`.
    """
    stats = measure(x, estimator)
    return apply(x, weight, bias, residual, stats, eps=eps, relu=relu), stats


def apply(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    residual: Tensor | None,
    stats: Tensor,
    *,
    eps: float,
    relu: bool,
) -> Tensor:
    """The y of `forward`, by statistics taken before: the same to the bit."""
    y = _deviations(x, stats) * _over(_scale(stats, weight, eps), x)
    if bias is not None:
        y = y + _over(bias.to(stats.dtype), x)
    if residual is not None:
        y = y + residual.to(stats.dtype)
    return (y.relu() if relu else y).to(x.dtype)


def backward(
    grad: Tensor,
    x: Tensor,
    out: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    stats: Tensor,
    estimator: Estimator,
    *,
    eps: float,
    relu: bool,
    has_residual: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of `forward`.

    Args:
        grad: of y.
        out: y, which the mask of the ReLU is taken from; without it, the mask is computed from x, for which there
            must have been no residual.
        has_residual: whether the residual's gradient is to be returned; asked for with `relu` only, for otherwise it
            is `grad` itself.

    Returns:
        The gradients of x (dtype of x), weight, bias (C,) and residual (dtype of x, or None).
    """
    if relu:
        assert out is not None or not has_residual
        with torch.no_grad():
            y = apply(x, weight, bias, None, stats, eps=eps, relu=False) if out is None else out
        grad = torch.where(y > 0, grad, 0)
    g, d, n = grad.to(stats.dtype), _deviations(x, stats), x.numel() // x.shape[1]
    _, sigma, _, threshold, share = stats
    r = (sigma.square() + eps).rsqrt()
    scale = _scale(stats, weight, eps)
    total_g, total_gd = _sum(g), _sum(g * d)
    dx = _over(scale, x) * (g - _over(total_g / n, x))
    if estimator.kind != "mean":
        gain, u = _slope(d, sigma, threshold, share, estimator)
        factor = -r * r * sigma * scale * total_gd * gain
        dx = dx + _over(factor, x) * (u - _over(_sum(u) / n, x))
    return dx.to(x.dtype), total_gd * r, total_g, grad if has_residual else None


def measure(x: Tensor, estimator: Estimator) -> Tensor:
    """The statistics of x (N, C, *): (5, C), rows as in `STATS`."""
    wide = torch.promote_types(x.dtype, torch.float32)
    n = x.numel() // x.shape[1]
    mean = _sum(x.to(wide)) / n
    zero = torch.zeros_like(mean)
    d = x.to(wide) - _over(mean, x)
    sigma, threshold, share = torch.ones_like(mean), zero, zero
    if estimator.kind == "l2":
        variance = _sum(d * d) / n
        # The root's derivative is infinite at 0, where nothing varies and every derivative is 0.
        sigma = torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt())
    elif estimator.kind == "l1":
        sigma = estimator.constant * _sum(d.abs()) / n
    elif estimator.kind == "topk":
        k = min(estimator.k, n)
        largest = d.abs().transpose(0, 1).flatten(1).topk(k, dim=1).values
        sigma = estimator.constant / k * largest.sum(1)
        threshold = largest[:, -1]
        tied = _sum((d.abs() == _over(threshold, x)).to(wide))
        share = (k - (largest > threshold[:, None]).sum(1)) / tied.clamp(min=1)
    slope_sum = zero if estimator.kind == "mean" else _sum(_slope(d, sigma, threshold, share, estimator)[1])
    return torch.stack([mean, sigma, slope_sum, threshold.detach(), share.detach()])


def _slope(
    d: Tensor, sigma: Tensor, threshold: Tensor, share: Tensor, estimator: Estimator
) -> tuple[Tensor | float, Tensor]:
    """The parts of dsigma/dd = gain u: gain (C,) or a number, u (N, C, *)."""
    n = d.numel() // d.shape[1]
    if estimator.kind == "l2":
        return torch.where(sigma == 0, 0, 1 / (n * torch.where(sigma == 0, 1, sigma))), d
    if estimator.kind == "l1":
        return estimator.constant / n, d.sign()
    size = d.detach().abs()
    above, tied = size > _over(threshold, d), size == _over(threshold, d)
    return estimator.constant / min(estimator.k, n), d.sign() * (above + tied * _over(share, d))


def _deviations(x: Tensor, stats: Tensor) -> Tensor:
    return x.to(stats.dtype) - _over(stats[0], x)


def _scale(stats: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """What deviations are multiplied by, (C,)."""
    r = (stats[1].square() + eps).rsqrt()
    return r if weight is None else r * weight.to(stats.dtype)


def _over(values: Tensor, x: Tensor) -> Tensor:
    """View (C,) values so that they broadcast over x (N, C, *)."""
    return values.view(1, -1, *[1] * (x.dim() - 2))


def _sum(x: Tensor) -> Tensor:
    """Sum x (N, C, *) per channel."""
    return x.sum((0, *range(2, x.dim())))
