"""Forward, backward, running statistics and evaluation against a numpy float64 reference written from the formulas."""

import math
from typing import NamedTuple

import numpy as np
import pytest
import torch

from norm_matters.norms import create_norm
from norm_matters.norms.kernels.dispatch import kernels
from norm_matters.norms.which import statistic_norm

BATCH_SPECS = ["l2", "l1", "linf", "topk:k=1", "topk:k=4", "topk:k=999", "lp:p=1", "lp:p=1.5", "lp:p=3", "mean"]
BATCH_SPECS += ["rms", "range", "range:constant=paper"]
BATCH_SPECS += ["linf:constant=paper", "lp:p=3,constant=paper", "l1:constant=0.3", "mean:scale=true", "l2:eps=0.001"]
BATCH_SPECS += ["ghost:size=3", "ghost:size=2,base=l1", "ghost:size=3,base=(topk:k=4)", "smooth:base=(topk:k=4)"]
BATCH_SPECS += ["smooth:base=l1,beta=0.5", "renorm:base=l1,r_max=1.3,d_max=0.1", "renorm:r_max=100,d_max=100"]
IMAGE_SPECS = ["group:groups=2", "layer", "instance", "position", "none"]
IMAGE_SPECS += ["group:groups=2,statistic=l1", "layer:statistic=topk:k=4", "instance:statistic=lp:p=3"]
IMAGE_SPECS += [
    "group:groups=2,statistic=range",
    "position:statistic=l1",
    "position:statistic=rms",
    "group:groups=2,statistic=mean",
]
CHANNELS = 6
SHAPES = [(16, 6), (5, 6, 7), (4, 6, 5, 3), (2, 6, 3, 4, 5)]
# Rounding of the input and of the output, in units of the largest value.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 3e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}
LAYOUTS = ["contiguous", "channels_last", "strided"]


class Expected(NamedTuple):
    y: np.ndarray
    dx: np.ndarray
    dweight: np.ndarray
    dbias: np.ndarray
    mean: np.ndarray
    var: np.ndarray


def sigma_and_slope(d: np.ndarray, estimator: torch.nn.Module) -> tuple[float, np.ndarray]:
    """Sigma of the deviations of one set of values and dsigma/dd, straight from the formulas of the paper."""
    n, size = len(d), np.abs(d)
    name = estimator.name
    if name in ("l2", "rms"):
        sigma = math.sqrt(np.mean(d**2))
        return sigma, d / (n * sigma) if sigma else d
    if name == "mean":
        return 1.0, np.zeros(n)
    if estimator.constant == "calibrated":
        constant = estimator.calibrated_constant(n)
    else:
        constant = estimator.paper_constant(n) if estimator.constant == "paper" else estimator.constant
    if name == "l1":
        return constant * np.mean(size), constant * np.sign(d) / n
    if name == "lp":
        p, moment = estimator.p, np.mean(size**estimator.p)
        slope = moment ** (1 / p - 1) * size ** (p - 1) * np.sign(d) / n if moment else 0 * d
        return constant * moment ** (1 / p), constant * slope
    if name == "range":
        ends = [np.where(d == end(d), 1.0, 0.0) for end in (np.max, np.min)]
        slope = ends[0] / np.sum(ends[0]) - ends[1] / np.sum(ends[1])
        return constant * (np.max(d) - np.min(d)), constant * slope
    k = 1 if name == "linf" else min(estimator.k, n)
    threshold = np.sort(size)[-k]
    ties = size == threshold
    weight = np.where(size > threshold, 1.0, np.where(ties, (k - np.sum(size > threshold)) / np.sum(ties), 0.0))
    return constant * np.sum(weight * size) / k, constant * weight * np.sign(d) / k


def sets_of(norm: torch.nn.Module, shape: tuple[int, ...]) -> np.ndarray:
    """A number for each value (N, C, *), equal where the values are normalised together."""
    count, channels, *space = shape
    image, channel, place = (
        np.arange(size).reshape(per)
        for size, per in ((count, (-1, 1, 1)), (channels, (1, -1, 1)), (math.prod(space), (1, 1, -1)))
    )
    groups = {"group": getattr(norm, "groups", 1), "layer": 1, "instance": channels}
    if norm.name in groups:
        labels = image * channels + channel // (channels // groups[norm.name]) + 0 * place
    elif norm.name == "ghost":
        parts = np.array_split(np.arange(count), max(1, math.ceil(count / norm.size - 0.5)))
        part = np.concatenate([np.full(len(images), number) for number, images in enumerate(parts)])
        labels = channel + channels * part.reshape(-1, 1, 1) + 0 * place
    elif norm.name == "position":
        labels = image * place.size + place + 0 * channel
    else:
        labels = channel + 0 * (image + place)
    return labels.reshape(shape)


def reference(x: np.ndarray, g: np.ndarray, norm: torch.nn.Module) -> Expected:
    """What a norm in training computes for input x and output gradient g, both (N, C, *), in float64."""
    x, g = x.astype(np.float64), g.astype(np.float64)
    channels = x.shape[1]
    per = (1, -1) + (1,) * (x.ndim - 2)
    weight, bias = (
        fallback if (p := getattr(norm, key)) is None else p.detach().double().numpy()
        for key, fallback in (("weight", np.ones(channels)), ("bias", np.zeros(channels)))
    )
    inner = getattr(norm, "base", getattr(norm, "statistic", None))
    estimator = statistic_norm(inner) if isinstance(inner, str) else norm
    centred = estimator.name != "rms"
    eps = 0.0 if estimator.name == "mean" else norm.eps
    dx, xhat, mean, var = np.empty_like(x), np.empty_like(x), np.zeros(channels), np.zeros(channels)
    labels = sets_of(norm, x.shape)
    gh = g * weight.reshape(per)
    for label in np.unique(labels):
        chosen = labels == label
        center = np.mean(x[chosen]) if centred else 0.0
        d = x[chosen] - center
        sigma, slope = sigma_and_slope(d, estimator)
        if norm.name == "smooth" and (previous := norm.smoothed_sigma[label].item()) > 0:
            sigma, slope = norm.beta * previous + (1 - norm.beta) * sigma, (1 - norm.beta) * slope
        r = 1 / math.sqrt(sigma**2 + eps)
        scale, shift = corrections(norm, label, center, sigma)
        gd = gh[chosen] * r - np.sum(gh[chosen] * d) * r**3 * sigma * slope
        dx[chosen] = scale * (gd - np.mean(gd) if centred else gd)
        xhat[chosen] = scale * d * r + shift
        # Of use for batch norms only, whose sets are the channels, or parts of them.
        part = len(d) * channels / x.size
        mean[label % channels] += part * center
        var[label % channels] += part * sigma**2 * (len(d) / (len(d) - 1) if estimator.name == "l2" else 1)
    y = xhat * weight.reshape(per) + bias.reshape(per)
    over = (0, *range(2, x.ndim))
    return Expected(y, dx, np.sum(g * xhat, over), np.sum(g, over), mean, var)


def corrections(norm: torch.nn.Module, channel: int, center: float, sigma: float) -> tuple[float, float]:
    """The r and d of a batch renormalisation."""
    if norm.name != "renorm":
        return 1.0, 0.0
    running_mean, running_var = norm.running_mean[channel].item(), norm.running_var[channel].item()
    r = math.sqrt((sigma**2 + norm.eps) / (running_var + norm.eps))
    d = (center - running_mean) / math.sqrt(running_var + norm.eps)
    return float(np.clip(r, 1 / norm.r_max, norm.r_max)), float(np.clip(d, -norm.d_max, norm.d_max))


def arrange(x: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another memory layout; a leaf that asks for its gradient."""
    if layout == "channels_last":
        formats = {4: torch.channels_last, 5: torch.channels_last_3d}
        x = x.contiguous(memory_format=formats.get(x.dim(), torch.contiguous_format))
    if layout == "strided":
        x = torch.stack([x, x], -1)[..., 0]
    return x.detach().requires_grad_()


def make(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """An input with a mean and a scale of its own per channel, and an output gradient."""
    draw = torch.Generator().manual_seed(seed)
    x, g = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    per = (1, -1) + (1,) * (len(shape) - 2)
    x = x * torch.linspace(0.5, 3, shape[1], dtype=torch.float64).view(per)
    return (x + torch.linspace(-1, 2, shape[1], dtype=torch.float64).view(per)).to(dtype), g.to(dtype)


def build(spec: str, dtype: torch.dtype = torch.float32, **options: object) -> torch.nn.Module:
    """A norm with weights that are neither all equal nor all positive."""
    norm = create_norm(spec, CHANNELS, dtype=dtype, **options)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.linspace(-1, 1.5, CHANNELS))
    return norm


def assert_near(actual: torch.Tensor, expected: np.ndarray, tolerance: float) -> None:
    error = np.abs(actual.detach().double().numpy() - expected).max()
    assert error <= tolerance * max(1.0, np.abs(expected).max()), f"off by {error}"


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", BATCH_SPECS + IMAGE_SPECS)
def test_training_step_equals_reference(spec, dtype):
    for shape in SHAPES:
        # An instance norm has nothing to normalise in (N, C).
        for layout in LAYOUTS if not (spec.startswith("instance") and len(shape) == 2) else []:
            check_training_step(spec, dtype, shape, layout)


def check_training_step(spec: str, dtype: torch.dtype, shape: tuple[int, ...], layout: str) -> None:
    norm = build(spec, dtype)
    if spec.startswith(("smooth", "renorm")):
        norm(make(shape, dtype, seed=1)[0])  # which leaves a trace
    x, g = make(shape, dtype)
    expected = reference(x.double().numpy(), g.double().numpy(), norm) if spec != "none" else None
    x = arrange(x, layout)
    y = norm(x)
    y.backward(arrange(g, layout).detach())
    assert (y.dtype, x.grad.dtype) == (dtype, dtype)
    if expected is None:
        assert y is x
        return
    tolerance = TOLERANCE[dtype]
    assert_near(y, expected.y, tolerance)
    assert_near(x.grad, expected.dx, 2 * tolerance)
    for key, gradient in (("weight", expected.dweight), ("bias", expected.dbias)):
        if (parameter := getattr(norm, key)) is not None:
            assert_near(parameter.grad, gradient, 4 * tolerance)
    if layout != "strided":
        assert y.stride() == x.stride() == x.grad.stride()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("spec", BATCH_SPECS)
def test_running_statistics_and_evaluation(spec, dtype):
    for momentum in (0.1, 1.0, None):
        check_running_statistics(spec, dtype, momentum)


def check_running_statistics(spec: str, dtype: torch.dtype, momentum: float | None) -> None:
    norm = build(spec, dtype, momentum=momentum)
    mean, var = np.zeros(CHANNELS), np.ones(CHANNELS)
    for step in range(3):
        x, g = make((8, CHANNELS, 3, 2), dtype, seed=step)
        expected = reference(x.double().numpy(), g.double().numpy(), norm)
        share = momentum or 1 / (step + 1)
        mean = (1 - share) * mean + share * expected.mean
        var = (1 - share) * var + share * expected.var
        norm(x)
    tolerance = max(3e-6 if dtype != torch.float64 else 0, 1e-12)
    assert norm.running_mean.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_near(norm.running_mean, mean, tolerance)
    assert_near(norm.running_var, var, tolerance)
    assert norm.num_batches_tracked == 3
    norm.eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    y = norm(x)
    per = (1, -1, 1, 1)
    weight = np.ones(CHANNELS) if norm.weight is None else norm.weight.detach().double().numpy()
    scaled = weight.reshape(per) / np.sqrt(var.reshape(per) + norm.eps)
    in_eval = (x.double().numpy() - mean.reshape(per)) * scaled + norm.bias.detach().double().numpy().reshape(per)
    assert_near(y, in_eval, TOLERANCE[dtype])
    assert y.dtype == dtype
    after = norm.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("spec", [spec for spec in BATCH_SPECS if not spec.startswith(("smooth", "renorm"))])
def test_untracked_norm_evaluates_by_the_batch(spec):
    norm = build(spec, track_running_stats=False)
    x, _ = make((8, CHANNELS, 3), torch.float32)
    in_training = norm(x)
    assert torch.equal(norm.eval()(x), in_training)
    assert norm.running_mean is None
    assert set(norm.state_dict()) <= {"weight", "bias"}


@pytest.mark.parametrize("spec", ["l1", "topk:k=4", "lp:p=3"])
@pytest.mark.parametrize("options", [{"affine": False}, {"bias": False}])
def test_norm_without_weight_or_bias(spec, options):
    norm = build(spec, **options)
    assert norm.bias is None
    assert (norm.weight is None) == ("affine" in options)
    x, g = make((8, CHANNELS, 3), torch.float32)
    expected = reference(x.numpy(), g.numpy(), norm)
    x.requires_grad_()
    y = norm(x)
    y.backward(g)
    assert_near(y, expected.y, 3e-6)
    assert_near(x.grad, expected.dx, 6e-6)


@pytest.mark.parametrize("spec", ["l2", "l1", "topk:k=4", "lp:p=3", "mean", "group:groups=2"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_input_with_float32_weights(spec, half):
    """As under autocast: the parameters stay in float32, the input comes in half."""
    norm = build(spec)
    x, g = make((8, CHANNELS, 3), half)
    expected = reference(x.double().numpy(), g.double().numpy(), norm)
    x.requires_grad_()
    y = norm(x)
    y.backward(g)
    assert y.dtype == x.grad.dtype == half
    assert norm.bias.grad.dtype == torch.float32
    assert_near(y, expected.y, TOLERANCE[half])
    assert_near(x.grad, expected.dx, 2 * TOLERANCE[half])


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:k=4", "lp:p=3", "mean", "group:groups=2"])
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_statistics_in_the_input_dtype(spec, half):
    """Coarser than in float32, but the same norm; the buffers stay in float32."""
    norm = build(spec, stats_dtype="input")
    x, g = make((8, CHANNELS, 4), half)
    expected = reference(x.double().numpy(), g.double().numpy(), norm)
    x.requires_grad_()
    y = norm(x)
    y.backward(g)
    assert_near(y, expected.y, 4 * TOLERANCE[half])
    assert_near(x.grad, expected.dx, 8 * TOLERANCE[half])
    if spec != "group:groups=2":
        assert norm.running_var.dtype == torch.float32
        assert_near(norm.running_var, 0.9 + 0.1 * expected.var, 4 * TOLERANCE[half])


def test_input_precision_is_what_the_paper_compares():
    """In float16 the squares of L2 overflow where L1's deviations do not."""
    x = 300 * make((32, CHANNELS, 8), torch.float32)[0].half()
    assert create_norm("l2", CHANNELS, stats_dtype="input")(x).abs().max() == 0
    l1 = create_norm("l1", CHANNELS, stats_dtype="input")(x)
    assert 0.9 < l1.float().square().mean().sqrt() < 1.1
    assert 0.9 < create_norm("l2", CHANNELS)(x).float().square().mean().sqrt() < 1.1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("choice", ["auto", "reference"])
def test_l2_has_the_numbers_of_torch(layout, dtype, choice):
    """To the bit without kernels of our own, which sum in another order."""
    ours, theirs = build("l2", dtype), torch.nn.BatchNorm2d(CHANNELS, dtype=dtype)
    theirs.load_state_dict(ours.state_dict())
    for step in range(3):
        x, g = make((8, CHANNELS, 4, 4), dtype, seed=step)
        results = []
        for norm in (ours, theirs):
            leaf = arrange(x, layout)
            with kernels(choice):
                y = norm(leaf)
                y.backward(g)
            results.append((y, leaf.grad))
        if choice == "reference" or dtype == torch.float64:
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6)
    for key, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value, rtol=1e-6, atol=1e-7)


def test_expanded_gradient_and_autocast():
    """The gradient of a mean is one number seen n times; under autocast the input is bfloat16."""
    norm = build("l1")
    x = make((8, CHANNELS, 3, 3), torch.float32)[0].requires_grad_()
    norm(x).mean().backward()
    expected = reference(x.detach().numpy(), np.full(x.shape, 1 / x.numel()), norm)
    assert_near(x.grad, expected.dx, 1e-6)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = torch.nn.functional.conv2d(x, torch.ones(CHANNELS, CHANNELS, 1, 1))
        y = norm(hidden)
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()


def test_strided_batches_of_many_pixels_with_few_channels():
    """The shape that takes the shortcut for reductions over few channels-last channels."""
    norm = build("topk:k=4")
    x, g = make((7, CHANNELS, 8, 8), torch.float32)
    expected = reference(x.numpy(), g.numpy(), norm)
    x = arrange(x, "channels_last")
    y = norm(x)
    y.backward(g)
    assert_near(y, expected.y, 3e-6)
    assert_near(x.grad, expected.dx, 6e-6)


@pytest.mark.parametrize("statistic", ["l2", "l1", "rms"])
def test_position_norm_over_the_last_dimension(statistic):
    """The tokens of a transformer, (N, L, C), are the positions of (N, C, L) with the channels last."""
    first, last = (build(f"position:statistic={statistic},channel_dim={dim}") for dim in (1, -1))
    x, g = make((4, CHANNELS, 5), torch.float32)
    leaves = [x.clone().requires_grad_(), x.transpose(1, 2).contiguous().requires_grad_()]
    first(leaves[0]).backward(g)
    y = last(leaves[1])
    y.backward(g.transpose(1, 2))
    assert y.is_contiguous()
    torch.testing.assert_close(leaves[0].grad.transpose(1, 2), leaves[1].grad)
    with pytest.raises(ValueError, match=r"expects \(N, ..., 6\), got \(4, 6, 5\)"):
        last(x)


def test_position_norms_are_torchs_layer_and_rms_norm():
    x = make((4, 5, CHANNELS), torch.float32)[0]
    ours, theirs = build("position:channel_dim=-1"), torch.nn.LayerNorm(CHANNELS)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(ours(x), theirs(x))
    ours, theirs = build("position:statistic=rms,channel_dim=-1"), torch.nn.RMSNorm(CHANNELS, eps=1e-5)
    theirs.weight = ours.weight
    torch.testing.assert_close(ours(x), theirs(x) + ours.bias)
