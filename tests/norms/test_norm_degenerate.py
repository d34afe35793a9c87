"""Inputs that break norms: constant channels, extreme scales, ties, NaN and inf, one value per channel."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.norms import create_norm, name_norms

SIGMA_SPECS = ["l2", "l1", "linf", "topk:k=3", "lp:p=1.5", "lp:p=3", "lp:p=30", "range"]
BATCH_SPECS = [*SIGMA_SPECS, "mean"]
COMPOSITES = ["ghost:size=3,base=l1", "smooth", "renorm:base=l1", "noisy:base=l1"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def step(spec: str, x: torch.Tensor, g: torch.Tensor, **options: object) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and input gradient of a new norm."""
    x = x.clone().requires_grad_()
    y = create_norm(spec, x.shape[1], dtype=x.dtype, **options)(x)
    y.backward(g)
    return y.detach(), x.grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stats_dtype", ["float32", "input"])
@pytest.mark.parametrize("spec", BATCH_SPECS + [spec for spec in COMPOSITES if not spec.startswith("renorm")])
def test_constant_channel(spec, stats_dtype, dtype):
    """Its output is the bias and its gradient finite: eps stands in for the variance."""
    x, g = draw(8, 2, 4, 4, dtype=dtype), draw(8, 2, 4, 4, seed=1, dtype=dtype)
    x[:, 0] = 0.1
    norm = create_norm(spec, 2, dtype=dtype, stats_dtype=stats_dtype)
    torch.nn.init.constant_(norm.bias, 0.5)
    x.requires_grad_()
    y = norm(x)
    y.backward(g)
    torch.testing.assert_close(y[:, 0], torch.full_like(y[:, 0], 0.5), rtol=0, atol=2e-3)
    assert torch.isfinite(x.grad).all()
    assert x.grad[:, 0].abs().max() > 0
    assert torch.isfinite(norm.running_var).all()


@pytest.mark.parametrize("spec", SIGMA_SPECS)
@pytest.mark.parametrize("zeros", [0.0, 7.0])
def test_all_values_equal(spec, zeros):
    """Every value ties with every other; the gradient is that of a fixed scale 1 / sqrt(eps)."""
    g = draw(4, 3, 5)
    y, dx = step(spec, torch.full((4, 3, 5), zeros), g)
    # (l2 is torch's kernel, which forms x * scale - mean * scale.)
    torch.testing.assert_close(y, torch.zeros_like(y), rtol=0, atol=1e-3 if spec == "l2" else 0)
    expected = (g - g.mean((0, 2), keepdim=True)) / np.sqrt(1e-5)
    torch.testing.assert_close(dx, expected, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("spec", SIGMA_SPECS)
def test_scale_of_the_input(spec, scale):
    """The output does not depend on the scale, the gradient falls with it (eps out of the way)."""
    x, g = draw(8, 3, 4, 4), draw(8, 3, 4, 4, seed=1)
    y, dx = step(spec, x, g, eps=0.0)
    scaled_y, scaled_dx = step(spec, x * scale, g, eps=0.0)
    torch.testing.assert_close(scaled_y, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(scaled_dx * scale, dx, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("scale", [1e-4, 1e4])
@pytest.mark.parametrize("spec", SIGMA_SPECS)
def test_scale_of_a_float16_input(spec, scale):
    """Statistics in float32: nothing overflows, and at 1e-4 it is eps that decides."""
    x, g = (scale * draw(8, 3, 4, 4)).half(), draw(8, 3, 4, 4, seed=1).half()
    y, dx = step(spec, x, g)
    exact_y, exact_dx = step(spec, x.double(), g.double())
    torch.testing.assert_close(y.double(), exact_y, rtol=2e-3, atol=1e-4)
    torch.testing.assert_close(dx.double(), exact_dx, rtol=5e-3, atol=1e-2 * exact_dx.abs().max().item())


@pytest.mark.parametrize("spec", ["linf", "topk:k=3", "topk:k=5", "topk:k=30", "range"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_ties_share_the_gradient_whatever_their_order(spec, dtype):
    """Values on a coarse grid tie; permuting the batch permutes the gradient and changes nothing else."""
    x, g = draw(16, 3, 4).round().to(dtype), draw(16, 3, 4, seed=1, dtype=dtype)
    y, dx = step(spec, x, g)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    permuted_y, permuted_dx = step(spec, x[order], g[order])
    tolerance = {"rtol": 1e-11, "atol": 1e-12} if dtype == torch.float64 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(permuted_y, y[order], **tolerance)
    torch.testing.assert_close(permuted_dx, dx[order], **tolerance)
    # Equal values with equal output gradients get equal input gradients.
    _, even = step(spec, x, torch.sign(x))
    for channel in range(3):
        for value in x[:, channel].unique():
            same = even[:, channel][x[:, channel] == value]
            assert (same.max() - same.min()).abs() <= 1e-12 * same.abs().max()


def test_a_tie_is_shared_by_hand():
    """Max 2 at three places, gradient of the output at one other: a third of sigma's gradient each."""
    x = torch.tensor([[-2.0], [2.0], [2.0], [-1.0], [-1.0], [0.0]], dtype=torch.float64)
    g = torch.zeros_like(x)
    g[5] = 1
    _, dx = step("linf:constant=1", x, g, eps=0.0)
    # y = x / max|x|; the mean is 0, dy5/dx = (delta_5 - 1/6) / 2, and y5 = 0 leaves no gradient through the maximum.
    torch.testing.assert_close(dx[:, 0], (torch.eye(6, dtype=torch.float64)[5] - 1 / 6) / 2)
    g[5], g[3] = 0, 1
    _, dx = step("linf:constant=1", x, g, eps=0.0)
    share = torch.tensor([-1, 1, 1, 0, 0, 0], dtype=torch.float64) / 3
    expected = (torch.eye(6, dtype=torch.float64)[3] - 1 / 6) / 2 + (share - share.mean()) / 4
    torch.testing.assert_close(dx[:, 0], expected)
    # The range is 4, from one place to two: y = x / 4.
    _, dx = step("range:constant=1", x, g, eps=0.0)
    share = torch.tensor([-1, 0.5, 0.5, 0, 0, 0], dtype=torch.float64)
    expected = (torch.eye(6, dtype=torch.float64)[3] - 1 / 6) / 4 + (share - share.mean()) / 16
    torch.testing.assert_close(dx[:, 0], expected)


@pytest.mark.parametrize("spec", BATCH_SPECS + COMPOSITES)
@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_batch_that_is_not_finite_updates_nothing(spec, momentum):
    for bad in (float("nan"), float("inf"), -float("inf")):
        check_refused_update(create_norm(spec, 3, momentum=momentum), bad)


def check_refused_update(norm: torch.nn.Module, bad: float) -> None:
    norm(draw(8, 3, 4))
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    x = draw(8, 3, 4, seed=1)
    x[2, 1, 3] = bad
    y = norm(x)
    assert not torch.isfinite(y[:, 1]).all()
    assert torch.isfinite(y[:, 0]).all()
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    norm(draw(8, 3, 4, seed=2))
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("spec", SIGMA_SPECS + COMPOSITES)
def test_a_variance_that_overflows_updates_nothing(spec):
    """Finite input, finite mean, but sigma squared is beyond float32."""
    norm = create_norm(spec, 2)
    norm(1e30 * draw(8, 2, 4))
    assert torch.equal(norm.running_var, torch.ones(2))
    assert torch.equal(norm.running_mean, torch.zeros(2))
    assert norm.num_batches_tracked == 0
    assert not norm.state_dict().get("smoothed_sigma", torch.zeros(2)).any()


@pytest.mark.parametrize("spec", [*BATCH_SPECS, *COMPOSITES, "instance", "layer"])
def test_one_value_per_channel_names_the_layer(spec):
    model = torch.nn.Sequential()
    model.add_module("first", torch.nn.Sequential(create_norm(spec, 1)))
    x = torch.ones(1, 1, 1)
    with pytest.raises(ValueError, match="Norm needs more than one value"):
        model(x)
    name_norms(model)
    with pytest.raises(ValueError, match=r"layer 'first\.0' .*needs more than one value"):
        model(x)
    if spec not in ("instance", "layer"):
        assert model.eval()(x).shape == x.shape


@pytest.mark.parametrize("spec", ["l1", "l2", "none", "group:groups=1"])
def test_wrong_channels(spec):
    norm = create_norm(spec, 3)
    for shape in [(4, 2, 5), (3,)]:
        with pytest.raises(ValueError, match="expects"):
            norm(torch.ones(shape))
    with pytest.raises(ValueError, match="needs more than one value"):
        create_norm("l1", 3)(torch.ones(0, 3, 4))


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:k=3", "lp:p=3", "range"])
@settings(deadline=None, max_examples=15)
@given(scale=st.floats(0.01, 100), shift=st.floats(-10, 10), images=st.integers(2, 9), pixels=st.integers(1, 40))
def test_invariant_to_scale_and_shift(spec, scale, shift, images, pixels):
    """What a norm is for: BN(a x + b) = BN(x), for eps = 0."""
    x = draw(images, 2, pixels, dtype=torch.float64)
    constant = {} if spec == "l2" else {"constant": 1.0}
    norm = create_norm(spec, 2, eps=0.0, dtype=torch.float64, **constant)
    torch.testing.assert_close(norm(scale * x + shift), norm(x), rtol=1e-9, atol=1e-9)
