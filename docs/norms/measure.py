"""The numbers of the cards: what each norm does to Gaussian and other input, and to numbers of few bits.

Deterministic: fixed seeds, one thread. Called by plots.py.
"""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from norm_matters.norms import create_norm
from norm_matters.norms.base import Norm
from norm_matters.norms.batchwise import ScaleNorm
from norm_matters.norms.imagewise import ImagewiseNorm
from norm_matters.norms.statistic import Deviations

# The norms with a statistic of their own: name -> spec. They have a plot each.
STATISTICS = {
    "l2": "l2",
    "l1": "l1",
    "linf": "linf",
    "topk": "topk:k=10",
    "lp": "lp:p=3",
    "range": "range",
    "rms": "rms",
}
# Further norms whose behaviour in low precision the cards tell: key of a table -> spec.
DERIVED = {
    "group": "group:groups=8",
    "group-l1": "group:groups=8,statistic=l1",
    "layer": "layer",
    "instance": "instance",
    "position": "position",
    "ghost": "ghost:size=4,base=l2",
    "ghost-l1": "ghost:size=4,base=l1",
    "frn": "timm:frn",
    "timm-batchnorm": "timm:batchnorm",
}
INPUTS = ("Gaussian", "uniform", "Laplace", "ReLU'd Gaussian")
COUNTS = (4, 16, 64, 256, 1024, 4096, 16384)
# Values drawn for one point of the first panel, and at least so many channels.
_VALUES, _CHANNELS = 1_000_000, 256
# Where the derivative is looked at.
_SLOPE_COUNT = 256
# Arithmetics of the third panel: series -> options of the norm.
FORMATS: dict[str, dict[str, Any]] = {
    f"{form}, {accumulator}": {"stats_format": form, "accumulator": accumulator}
    for form in ("fp16", "bf16", "e4m3")
    for accumulator in ("fp32", "sequential")
}
# The same with a float16 input and a float16 network: series -> options.
HALF: dict[str, dict[str, Any]] = {"float16 input": {}, "float16 input, stats_dtype=input": {"stats_dtype": "input"}}
SIGMAS = tuple(2.0**power for power in range(-14, 14))
# Nothing against the smallest sigma squared. (Not 0, which torch's batch norm refuses.)
_EPS = 1e-14
# (images, rows, columns) of the third panel: 16,384 values per channel.
_IMAGES, _SIDE = 16, 32


class Row(NamedTuple):
    """A row of plots.csv: a point of a series, in one panel of one norm's plot."""

    norm: str
    panel: str
    series: str
    x: float
    y: float


def all_rows() -> Iterator[Row]:
    """Every number behind the plots and the tables, in a fixed order."""
    for name, spec in STATISTICS.items():
        yield from rms_rows(name, spec)
        yield from slope_rows(name, spec)
        yield from spread_rows(name, spec)
    for name, spec in {**STATISTICS, **DERIVED}.items():
        yield from precision_rows(name, spec)
    yield from mean_rows()


def draw(kind: str, shape: tuple[int, ...], seed: int) -> Tensor:
    """Independent values of mean 0 and standard deviation 1; the ReLU'd ones are max(z, 0) of such z."""
    generator = torch.Generator().manual_seed(seed)
    if kind == "uniform":
        return (torch.rand(shape, generator=generator) - 0.5) * math.sqrt(12)
    z = torch.randn(shape, generator=generator)
    if kind == "Laplace":
        # A Gaussian whose variance is exponential.
        return z * (-torch.rand(shape, generator=generator).clamp(min=1e-30).log()).sqrt()
    return z.relu() if kind == "ReLU'd Gaussian" else z


def rms_rows(name: str, spec: str) -> Iterator[Row]:
    """The rms of the output, by number of values per channel n; series `INPUT, CONSTANT`."""
    kinds = ("calibrated", "paper") if isinstance(create_norm(spec, 1), ScaleNorm) else ("",)
    for kind in INPUTS:
        for n in COUNTS:
            x = draw(kind, (1, max(_CHANNELS, _VALUES // n), n), seed=n)
            # At n = 4 a ReLU'd channel can be all zeros: it has no scale.
            x = x[:, x.amax((0, 2)) > x.amin((0, 2))]
            for constant in kinds:
                options = {"constant": constant} if constant else {}
                y = create_norm(spec, x.shape[1], affine=False, track_running_stats=False, **options)(x)
                # The output's mean is no part of its scale where nothing is subtracted.
                yield Row(name, "rms", f"{kind}, {constant or 'no constant'}", n, float(y.square().mean().sqrt()))


def slope_rows(name: str, spec: str) -> Iterator[Row]:
    """n times the derivative of sigma with respect to a deviation, over that deviation; 256 Gaussian values."""
    norm: Any = create_norm(spec, 1)
    n = _SLOPE_COUNT
    x = draw("Gaussian", (1, 1, n), seed=0).sort().values
    statistic = norm.statistic_for(n)
    mean = x.mean((0, 2)) if statistic.centred else torch.zeros(1)
    deviations = Deviations(x, mean, x.dtype, n)
    measure = statistic.measure(deviations)
    d = deviations.dense()
    if measure.peaks is None:
        slope = statistic.slope(d.clone(), measure.extras)
    else:
        slope = torch.zeros_like(d)
        slope[0, 0, measure.peaks[0]] = d[0, 0, measure.peaks[0]].sign()
    for deviation, weight in zip(d.flatten(), (n * measure.gain * slope).flatten(), strict=True):
        yield Row(name, "slope", "dsigma/dd", float(deviation), float(weight))


def spread_rows(name: str, spec: str) -> Iterator[Row]:
    """The relative standard deviation of sigma from batch to batch of n Gaussian values."""
    norm: Any = create_norm(spec, 1)
    for n in COUNTS:
        yield Row(name, "spread", "Gaussian", n, norm.spread(n))


def precision_rows(name: str, spec: str) -> Iterator[Row]:
    """sigma^ / sigma, and the relative error of the input's gradient, by sigma, in each arithmetic.

    Both against the same norm in float64 on the same input, with an eps that is as good as none.
    """
    example = create_norm(spec, 8)
    imagewise = isinstance(example, ImagewiseNorm) or spec == "timm:frn"
    for series, options in {**FORMATS, **HALF}.items():
        if not set(options) <= set(example.OPTIONS):
            continue
        x, sigmas = _scaled(imagewise)
        half = series in HALF
        x = x.half() if half else x
        norm = create_norm(spec, x.shape[1], eps=_EPS, **options)
        reference = create_norm(spec, x.shape[1], eps=_EPS, dtype=torch.float64)
        y, dx = _forward_backward(norm.half() if half else norm, x, imagewise)
        true_y, true_dx = _forward_backward(reference, x.double(), imagewise)
        ratio = true_y.square().sum(1).sqrt() / y.square().sum(1).sqrt()
        error = (dx - true_dx).square().sum(1).sqrt() / true_dx.square().sum(1).sqrt()
        for sigma, value in zip(sigmas, ratio, strict=True):
            yield Row(name, "sigma", series, sigma, float(value.nan_to_num(math.inf, math.inf)))
        for sigma, value in zip(sigmas, error, strict=True):
            yield Row(name, "gradient", series, sigma, float(value.nan_to_num(math.inf, math.inf)))


def _scaled(imagewise: bool) -> tuple[Tensor, tuple[float, ...]]:
    """Gaussian input in which each channel, or each image, has its own sigma."""
    scale = torch.tensor(SIGMAS)
    if imagewise:
        shape, view = (len(SIGMAS), 8, _SIDE, _SIDE), scale[:, None, None, None]
    else:
        shape, view = (_IMAGES, len(SIGMAS), _SIDE, _SIDE), scale[:, None, None]
    return draw("Gaussian", shape, seed=1) * view, SIGMAS


def _forward_backward(norm: Norm, x: Tensor, imagewise: bool) -> tuple[Tensor, Tensor]:
    """Output and the input's gradient, (scales, values) in float64, for the same Gaussian gradient of the output."""
    x = x.clone().requires_grad_()
    y = norm(x)
    g = draw("Gaussian", tuple(x.shape), seed=2).to(y.dtype)
    y.backward(g)
    assert x.grad is not None
    axis = 0 if imagewise else 1
    rows = [values.detach().double().movedim(axis, 0).flatten(1) for values in (y, x.grad)]
    return rows[0], rows[1]


def mean_rows() -> Iterator[Row]:
    """For mean-only batch norm: mean^ / mean of input whose mean is its standard deviation."""
    for series, options in FORMATS.items():
        x, sigmas = _scaled(False)
        scale = torch.tensor(sigmas)
        norm: Any = create_norm("mean", len(sigmas), **options)
        # Not the running mean: one channel that is not finite would leave it as it was.
        _, mean, _ = norm.normalise_batch(x + scale[:, None, None])
        for sigma, value in zip(sigmas, (mean / scale).nan_to_num(math.inf, math.inf), strict=True):
            yield Row("mean", "mean", series, sigma, float(value))
