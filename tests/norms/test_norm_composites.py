"""Norms made of another one's statistic: ghost, smoothed, renormalised, noisy; and the frozen one."""

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from norm_matters.core.errors import UserError
from norm_matters.norms import (
    absorb_norm,
    calibrate_norm,
    convert_norm,
    create_norm,
    freeze_norm,
    name_norms,
    norms_of,
    spec_of,
    unfreeze_norm,
)
from norm_matters.norms.ghost import group_sizes
from norm_matters.norms.which import statistic_norm

COMPOSITES = ["ghost:size=3,base=l1", "smooth:base=l1", "renorm:base=l1,r_max=1.1,d_max=0.1", "noisy:base=l1"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


@given(images=st.integers(1, 500), size=st.integers(1, 100))
def test_ghost_divides_a_batch_evenly(images, size):
    sizes = group_sizes(images, size)
    assert sum(sizes) == images
    assert max(sizes) - min(sizes) <= 1
    # No other number of groups is nearer to images / size.
    assert abs(len(sizes) - images / size) <= 0.5 or sizes == [images]
    if min(images, size) > 1:
        assert min(sizes) > 1


def test_ghost_groups_by_hand():
    assert group_sizes(64, 32) == [32, 32]
    assert group_sizes(70, 32) == [35, 35]
    assert group_sizes(80, 32) == [40, 40]
    assert group_sizes(81, 32) == [27, 27, 27]
    assert group_sizes(5, 32) == [5]


@pytest.mark.parametrize("images", [8, 11])
def test_ghost_of_l2_is_torchs_batch_norm_on_each_group(images):
    ours, theirs = create_norm("ghost:size=4", 3), torch.nn.BatchNorm2d(3, momentum=1.0)
    x, g = draw(images, 3, 2, 2).requires_grad_(), draw(images, 3, 2, 2, seed=1)
    y = ours(x)
    y.backward(g)
    twin, start, mean, var = x.detach().clone().requires_grad_(), 0, 0, 0
    for size in group_sizes(images, 4):
        part = theirs(twin[start : start + size])
        part.backward(g[start : start + size])
        torch.testing.assert_close(y[start : start + size], part)
        mean, var = mean + size / images * theirs.running_mean, var + size / images * theirs.running_var
        start += size
    torch.testing.assert_close(x.grad, twin.grad)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad)
    torch.testing.assert_close(ours.running_mean, 0.1 * mean)
    torch.testing.assert_close(ours.running_var, 0.9 + 0.1 * var)


def test_ghost_refuses_a_group_with_one_value():
    model = torch.nn.Sequential(create_norm("ghost:size=1", 4))
    name_norms(model)
    with pytest.raises(ValueError, match=r"layer '0' \(ghost:size=1,base=l2\) needs more than one value .* each group"):
        model(draw(6, 4))
    assert model(draw(6, 4, 2)).shape == (6, 4, 2)


def test_smoothing_by_hand():
    """sigma_t = beta sigma_(t-1) + (1 - beta) sigma of the batch, the first batch its own; running_var follows it."""
    norm, base = create_norm("smooth:base=l1,beta=0.5", 2, momentum=1.0), create_norm("l1", 2, momentum=1.0)
    sigma = None
    for seed, scale in enumerate([1.0, 4.0, 0.5, 2.0]):
        x = scale * draw(16, 2, 3, seed=seed)
        y, own = norm(x), base(x)
        batch = base.running_var.sqrt()
        sigma = batch if sigma is None else 0.5 * sigma + 0.5 * batch
        torch.testing.assert_close(norm.smoothed_sigma, sigma)
        torch.testing.assert_close(norm.running_var, sigma**2)
        torch.testing.assert_close(y, own * (batch / sigma).view(1, 2, 1), rtol=1e-4, atol=1e-4)


def test_trap_5_the_smoothed_constant_is_applied_once():
    """On Gaussian input the output keeps std 1 (the released code: 2.3)."""
    norm = create_norm("smooth", 64)
    deviations = [norm(draw(32, 64, 5, 5, seed=seed)).std().item() for seed in range(12)]
    assert deviations == pytest.approx([1.0] * 12, abs=0.02)


@pytest.mark.parametrize(
    "spec", ["smooth:base=l1", "smooth:base=(topk:k=3),beta=0.3", "noisy:base=l1", "noisy:like=l1"]
)
def test_gradcheck_with_the_state_of_one_moment(spec):
    """The previous sigma and the factor are constants; each evaluation starts from the same state."""
    norm = create_norm(spec, 3, dtype=torch.float64)
    norm(draw(8, 3, dtype=torch.float64, seed=2))

    def call(x: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return copy.deepcopy(norm)(x)

    assert torch.autograd.gradcheck(call, (draw(5, 3, 2, dtype=torch.float64).requires_grad_(),))


def test_smoothing_starts_again_where_it_should():
    norm = create_norm("smooth:base=l1", 2)
    norm(draw(8, 2))
    assert norm.smoothed_sigma.all()
    saved = copy.deepcopy(norm.state_dict())
    plain = create_norm("l1", 2)
    norm.load_state_dict(plain.state_dict())
    assert not norm.smoothed_sigma.any()
    norm.load_state_dict(saved)
    assert norm.smoothed_sigma.all()
    for reset in (norm.reset_running_stats, norm.reset_parameters):
        norm(draw(8, 2))
        reset()
        assert not norm.smoothed_sigma.any()
    # A channel whose sigma was 0 has nothing to be smoothed with.
    norm(torch.ones(8, 2))
    norm(draw(8, 2))
    torch.testing.assert_close(norm(draw(8, 2)), plain(draw(8, 2)))
    assert norm.half().smoothed_sigma.dtype == torch.float32


def test_renormalisation_gives_the_output_of_evaluation():
    norm = create_norm("renorm:base=(topk:k=4),r_max=1e3,d_max=1e3", 3)
    for seed in range(3):
        x = 3 * draw(16, 3, 4, seed=seed) + 2
        expected = copy.deepcopy(norm).eval()(x)
        torch.testing.assert_close(norm(x), expected, rtol=1e-4, atol=1e-5)


def test_renormalisation_within_no_bounds_is_the_base():
    norm, base = create_norm("renorm:base=l1,r_max=1,d_max=0", 3), create_norm("l1", 3)
    for seed in range(2):
        x, g = 3 * draw(16, 3, 4, seed=seed) + 2, draw(16, 3, 4, seed=9)
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = [layer(leaf) for layer, leaf in zip((norm, base), leaves, strict=True)]
        for y in outputs:
            y.backward(g)
        torch.testing.assert_close(*outputs)
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
        torch.testing.assert_close(norm.running_var, base.running_var)


def test_renormalisation_needs_running_statistics():
    with pytest.raises(UserError, match="renorm needs running statistics"):
        create_norm("renorm:track_running_stats=false", 3)


def factors(spec: str, base: str, x: torch.Tensor) -> torch.Tensor:
    """By what the noisy norm multiplied sigma, per channel."""
    noisy, plain = (create_norm(name, x.shape[1], momentum=1.0, dtype=torch.float64) for name in (spec, base))
    noisy(x)
    plain(x)
    return (noisy.running_var / plain.running_var).sqrt()


@pytest.mark.parametrize(("base", "like"), [("l2", "linf"), ("l1", "topk:k=10"), ("rms", "range")])
def test_noise_has_the_spread_of_the_other_statistic(base, like):
    torch.manual_seed(1)
    x = draw(20, 4000, 50, dtype=torch.float64)
    drawn = factors(f"noisy:base={base},like=({like})", base, x)
    assert drawn.mean().item() == pytest.approx(1, abs=0.01)
    sigma = drawn * statistic_norm(base).normalise_batch(x)[2].sqrt()
    # Base and noise together.
    assert (sigma.std() / sigma.mean()).item() == pytest.approx(statistic_norm(like).spread(1000), rel=0.05)


def test_no_noise_where_the_base_varies_more():
    x = draw(20, 50, 5, dtype=torch.float64)
    for spec, base in (("noisy:base=linf,like=l2", "linf"), ("noisy:base=l1,like=l1", "l1")):
        assert torch.equal(factors(spec, base, x), torch.ones(50, dtype=torch.float64))


def test_noise_follows_torchs_generator_and_leaves_evaluation():
    x = draw(8, 4, 3)
    first, again, other = (torch.manual_seed(seed) and create_norm("noisy", 4)(x) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    untracked = create_norm("noisy:track_running_stats=false", 4).eval()
    assert torch.equal(untracked(x), untracked(x))
    assert untracked(x).square().mean().item() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("spec", COMPOSITES)
def test_activation_checkpointing_repeats_what_was_done(spec):
    """The same gradients and the same state as without, though the repetition comes after the buffers moved."""
    found = []
    for wrapped in (True, False):
        torch.manual_seed(0)
        norm = create_norm(spec, 4)
        for seed in range(3):
            norm.zero_grad()
            x = (seed + 1) * draw(7, 4, 5, seed=seed).requires_grad_()
            x.retain_grad()
            y = checkpoint(norm, x, use_reentrant=False) if wrapped else norm(x)
            y.pow(3).sum().backward()
        found.append([y.detach(), x.grad, norm.weight.grad, *norm.state_dict().values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("spec", COMPOSITES)
def test_activation_checkpointing_of_a_layer_used_twice_counts_each_use_once(spec):
    norm = create_norm(spec, 4)
    y = sum(checkpoint(norm, draw(7, 4, 5, seed=seed).requires_grad_(), use_reentrant=False) for seed in range(2))
    before = copy.deepcopy(norm.state_dict())
    y.sum().backward()
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert norm.num_batches_tracked == 2


@pytest.mark.parametrize("spec", [*COMPOSITES, "frozen"])
def test_state_is_saved_and_loaded(spec):
    norm = create_norm(spec, 4)
    norm(draw(8, 4, 5))
    twin = create_norm(spec, 4)
    twin.load_state_dict(norm.state_dict())
    outputs = []
    for layer in (norm, twin):
        torch.manual_seed(3)
        outputs += [layer(draw(8, 4, 5, seed=1))]
    assert torch.equal(*outputs)
    assert all(torch.equal(value, twin.state_dict()[key]) for key, value in norm.state_dict().items())


@pytest.mark.parametrize("spec", COMPOSITES)
def test_tools_act_on_composites(spec):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3), torch.nn.BatchNorm2d(6), torch.nn.ReLU())
    with torch.no_grad():
        model[1].weight.uniform_(0.5, 2)
    x = draw(7, 3, 8, 8)
    before = copy.deepcopy(model)
    for other in (spec, "l2"):
        assert convert_norm(model, other).count == 1
        assert model[1].weight is not None
        torch.testing.assert_close(model.eval()(x), before.eval()(x))
        model.train()
        if other == spec:
            assert len(norms_of(model)) == 1
            assert model[1].base == "l1"
    convert_norm(model, spec)
    # Statistics of batches, whatever their order and what the norm does of its own in training.
    batches = [(seed + 1) * draw(7, 3, 8, 8, seed=seed) for seed in range(4)]
    state = {}
    for order in (batches, batches[::-1]):
        copied = copy.deepcopy(model)
        calibrate_norm(copied, order)
        state[len(state)] = copied[1].state_dict()
    for key, value in state[0].items():
        torch.testing.assert_close(value, state[1][key], rtol=1e-6, atol=1e-7)
    freeze_norm(model)
    saved = copy.deepcopy(model.state_dict())
    model.train()(x)
    assert all(torch.equal(saved[key], value) for key, value in model.state_dict().items())
    assert "frozen=all" in spec_of(model[1])
    unfreeze_norm(model)
    y = model.eval()(x)
    assert absorb_norm(model, x).count == 1
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)


def test_frozen_is_torchvisions_frozen_batch_norm():
    from norm_matters.core.torchvision import torchvision

    norm, theirs, plain = create_norm("frozen", 4), torchvision.ops.FrozenBatchNorm2d(4), torch.nn.BatchNorm2d(4)
    for buffer in plain.state_dict().values():
        if buffer.is_floating_point():
            buffer.uniform_(0.5, 2)
    norm.load_state_dict(plain.state_dict())
    theirs.load_state_dict({key: value for key, value in plain.state_dict().items() if key != "num_batches_tracked"})
    saved = copy.deepcopy(norm.state_dict())
    x = draw(6, 4, 3, 3).requires_grad_()
    torch.testing.assert_close(norm.train()(x), theirs(x), rtol=1e-5, atol=1e-5)
    norm(x).square().sum().backward()
    assert norm.weight.grad is None
    assert x.grad.abs().sum() > 0
    assert all(torch.equal(saved[key], value) for key, value in norm.state_dict().items())
    unfreeze_norm(norm)
    assert norm.weight.requires_grad
    torch.testing.assert_close(norm(x).mean((0, 2, 3)), norm.bias, rtol=0, atol=1e-5)


def test_noise_is_log_normal_with_mean_one():
    """A small batch asks for so much noise that a Gaussian factor would be negative now and then."""
    torch.manual_seed(0)
    x = draw(3, 20_000, dtype=torch.float64)
    drawn = factors("noisy:base=mean,like=linf", "mean", x)
    spread = statistic_norm("linf").spread(3)
    assert drawn.min() > 0
    assert drawn.mean().item() == pytest.approx(1, abs=0.02)
    assert drawn.std().item() == pytest.approx(spread, rel=0.06)
    assert drawn.log().std().item() == pytest.approx(math.sqrt(math.log1p(spread**2)), rel=0.03)
