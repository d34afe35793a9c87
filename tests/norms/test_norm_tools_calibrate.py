"""Calibration: against closed forms and torch's own, in any order, and without a trace when it fails."""

import copy
import random
from collections import OrderedDict
from typing import NamedTuple

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from norm_matters.norms import calibrate_norm, convert_norm, create_norm, freeze_norm


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def network(spec: str = "l2", dropout: float = 0.0) -> nn.Sequential:
    torch.manual_seed(0)
    layers = {
        "conv1": nn.Conv2d(3, 8, 3),
        "norm1": create_norm(spec, 8),
        "act": nn.ReLU(),
        "drop": nn.Dropout(dropout),
        "conv2": nn.Conv2d(8, 4, 3),
        "norm2": create_norm(spec, 4),
    }
    return nn.Sequential(OrderedDict(layers))


BATCHES = [3 * draw(16, 3, 8, 8, seed=seed) + seed / 8 for seed in range(6)]


def numbers(model: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items() if "norm" in key}


def test_l2_equals_torchs_own():
    """torch averages the unbiased variances of equal batches, as `running_var` of l2 has them."""
    ours, theirs = network(), network()
    for name in ("norm1", "norm2"):
        norm = nn.BatchNorm2d(getattr(theirs, name).num_features)
        setattr(theirs, name, norm)
    update_bn(BATCHES, theirs)
    calibrate_norm(ours, BATCHES)
    for name in ("norm1", "norm2"):
        mine, torchs = getattr(ours, name), getattr(theirs, name)
        torch.testing.assert_close(mine.running_mean, torchs.running_mean, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(mine.running_var, torchs.running_var, rtol=2e-6, atol=0)
        assert mine.num_batches_tracked == torchs.num_batches_tracked == 6


def test_population_variance_is_that_of_all_values():
    """By the law of total variance: also of unequal batches whose means differ, in the first layer and the next."""
    batches = [batch[: 16 - 2 * index].double() for index, batch in enumerate(BATCHES)]
    model = network().double()
    calibrate_norm(model, batches, variance="population")
    z = torch.cat([model.conv1(batch) for batch in batches]).detach()
    torch.testing.assert_close(model.norm1.running_mean, z.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.norm1.running_var, z.var((0, 2, 3), unbiased=False), rtol=1e-12, atol=0)
    # The second layer sees what the first one makes of each batch by that batch's statistics.
    upstream = copy.deepcopy(model)
    normed = [upstream.conv2(upstream.norm1.train()(upstream.conv1(batch)).relu()) for batch in batches]
    z = torch.cat(normed).detach()
    torch.testing.assert_close(model.norm2.running_mean, z.mean((0, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(model.norm2.running_var, z.var((0, 2, 3), unbiased=False), rtol=1e-12, atol=0)


def test_population_variance_is_refused_for_other_statistics():
    model = network("l1")
    with pytest.raises(ValueError, match=r"'norm1' \(l1\): variance='population' is defined for l2 only"):
        calibrate_norm(model, BATCHES, variance="population")
    with pytest.raises(ValueError, match="must be 'batch' or 'population'"):
        calibrate_norm(model, BATCHES, variance="unbiased")


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:k=10"])
def test_batches_count_by_their_values(spec):
    """In float64, against the formula: sum of n_b s_b / sum of n_b."""
    model = network(spec).double()
    batches = [BATCHES[0].double(), BATCHES[1][:3].double(), BATCHES[2][:7, :, :6].double()]
    expected, total = torch.zeros(8, dtype=torch.float64), 0
    for batch in batches:
        norm = create_norm(spec, 8, momentum=1.0).double()
        z = model.conv1(batch).detach()
        norm(z)
        expected += z.numel() // 8 * norm.running_var
        total += z.numel() // 8
    calibrate_norm(model, batches)
    torch.testing.assert_close(model.norm1.running_var, expected / total, rtol=1e-12, atol=0)


def test_the_order_of_batches_does_not_matter():
    first, second = network("l1"), network("l1")
    many = [batch * factor for factor in (0.01, 1, 100) for batch in BATCHES]
    calibrate_norm(first, many)
    shuffled = random.Random(3).sample(many, len(many))
    assert any(a is not b for a, b in zip(many, shuffled, strict=True))
    calibrate_norm(second, shuffled)
    for key, value in numbers(first).items():
        torch.testing.assert_close(numbers(second)[key], value, rtol=1e-7, atol=1e-7)


class LoaderBatch(NamedTuple):
    labels: Tensor
    images: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda images: (images, torch.zeros(len(images))),
        lambda images: [images],
        lambda images: LoaderBatch(torch.zeros(len(images)), images),
    ],
)
def test_kinds_of_batches(wrap):
    plain, wrapped = network(), network()
    calibrate_norm(plain, BATCHES)
    calibrate_norm(wrapped, (wrap(batch) for batch in BATCHES))
    assert all(torch.equal(value, numbers(wrapped)[key]) for key, value in numbers(plain).items())


@pytest.mark.parametrize("batch", [7, {"pixels": BATCHES[0]}, (), ("images",)])
def test_what_is_no_batch_is_refused(batch):
    with pytest.raises(ValueError, match="must be images"):
        calibrate_norm(network(), [batch])


def test_all_but_statistics_is_left_as_it_was():
    """Flags, random streams, gradients, weights; and dropout is off."""
    model = network("l1", dropout=0.5)
    model.drop.eval()
    model.norm2.eval()
    flags = [module.training for module in model.modules()]
    model(BATCHES[0]).sum().backward()
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    torch.manual_seed(7)
    loader = torch.utils.data.DataLoader(torch.cat(BATCHES), batch_size=16, shuffle=True)
    twin = copy.deepcopy(model)
    twin.drop = nn.Identity()
    state = torch.get_rng_state()
    calibrate_norm(model, loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == flags
    assert all(torch.equal(weights[key], value) for key, value in model.named_parameters())
    assert all(torch.equal(a, b.grad) for a, b in zip(gradients, model.parameters(), strict=True))
    assert model.norm1.observer is None
    calibrate_norm(twin, loader)
    assert all(torch.equal(value, numbers(twin)[key]) for key, value in numbers(model).items())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_interruption_leaves_the_old_statistics(error):
    model = network("topk")
    model(BATCHES[0])
    before, flags = numbers(model), [module.training for module in model.modules()]

    def broken():
        yield from BATCHES[:3]
        raise error

    with pytest.raises(error):
        calibrate_norm(model, broken())
    assert all(torch.equal(before[key], value) for key, value in numbers(model).items())
    assert [module.training for module in model.modules()] == flags
    model(BATCHES[1])
    assert model.norm1.num_batches_tracked == 2, "it tracks batches again"


def test_batches_that_are_not_finite_are_left_out_and_counted():
    clean, poisoned = network(), network()
    infinite = BATCHES[0].clone()
    infinite[0, 0, 0, 0] = float("inf")
    calibrate_norm(clean, BATCHES)
    report = calibrate_norm(poisoned, [BATCHES[0], infinite, *BATCHES[1:]])
    assert (report.batches, report.rejected) == (7, 2)
    assert "6 batches, 1 rejected" in str(report)
    assert all(torch.equal(value, numbers(poisoned)[key]) for key, value in numbers(clean).items())
    with pytest.raises(ValueError, match=r"'norm1' \(l2\): all of its 1 batches were rejected"):
        calibrate_norm(network(), [infinite])


def test_no_batch_is_an_error():
    with pytest.raises(ValueError, match="given no batch"):
        calibrate_norm(network(), [])


def test_norms_that_are_left():
    model = network("l1")
    model.norm3 = create_norm("layer", 4)
    model.add_module("unused", nn.ModuleList([create_norm("l1", 4)]))
    model.unused.forward = lambda x: x
    freeze_norm(model, affine=False, include="norm1")
    before = numbers(model)
    report = calibrate_norm(model, BATCHES)
    assert [row.name for row in report.rows] == ["norm2"]
    assert {row.name: row.note for row in report.left} == {
        "norm1": "its statistics are frozen",
        "norm3": "has no running statistics",
        "unused.0": "it saw no batch",
    }
    assert all(torch.equal(before[key], value) for key, value in numbers(model).items() if key.startswith("norm1"))
    with pytest.raises(ValueError, match=r"'norm1' \(l1:frozen=stats\): its statistics are frozen"):
        calibrate_norm(model, BATCHES, include="norm1")


def test_norms_that_are_not_selected_stay_in_evaluation():
    model = network("l1")
    model.norm1.running_var.fill_(4)
    before = numbers(model)
    calibrate_norm(model, BATCHES, exclude="norm1")
    assert all(torch.equal(before[key], value) for key, value in numbers(model).items() if key.startswith("norm1"))
    model.norm1.eval()
    z = torch.cat([model.conv2(model.norm1(model.conv1(batch)).relu()) for batch in BATCHES])
    torch.testing.assert_close(model.norm2.running_mean, z.mean((0, 2, 3)).detach(), rtol=1e-5, atol=1e-5)


def test_a_norm_used_twice_averages_over_both_uses():
    norm = create_norm("l2:momentum=none", 3)
    model = nn.Sequential(norm, nn.Softplus(), norm).double()
    calibrate_norm(model, [batch.double() for batch in BATCHES])
    first = torch.cat([batch.double() for batch in BATCHES])
    alone = create_norm("l2", 3, track_running_stats=False).double()
    second = torch.cat([nn.Softplus()(alone(batch.double())) for batch in BATCHES])
    expected = (first.mean((0, 2, 3)) + second.mean((0, 2, 3))) / 2
    torch.testing.assert_close(norm.running_mean, expected.detach(), rtol=1e-12, atol=1e-12)
    assert norm.num_batches_tracked == 12


def test_torchs_norms_are_refused_with_the_way_out():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    with pytest.raises(ValueError, match=r"layer '1' \(BatchNorm2d\): not a norm of ours; convert_norm"):
        calibrate_norm(model, BATCHES)
    convert_norm(model, "l2")
    assert calibrate_norm(model, BATCHES).count == 1


def test_a_large_mean_does_not_spoil_the_variance_between_batches():
    """The mean is 1e6 times the spread: sums of squares would lose it in float32, and half of it in float64."""
    norm = create_norm("l2", 1).double()
    batches = [1e6 + draw(64, 1, seed=seed).double() + seed for seed in range(5)]
    calibrate_norm(nn.Sequential(norm), batches, variance="population")
    expected = np.var(torch.cat(batches).numpy())
    assert norm.running_var.item() == pytest.approx(expected, rel=1e-9)


def digits() -> tuple[Tensor, Tensor]:
    found = load_digits()
    return torch.tensor(found.images[:, None] / 8 - 1, dtype=torch.float32), torch.tensor(found.target)


@pytest.mark.parametrize(
    "spec", ["l2", "l1", *(pytest.param(spec, marks=pytest.mark.slow) for spec in ("linf", "topk:k=10"))]
)
def test_it_restores_a_network_whose_statistics_are_wrong(spec):
    """The error on the 1,797 digits comes back to within 0.1 points of what it was: to one image."""
    torch.manual_seed(0)
    images, labels = digits()
    norms = [create_norm(spec, 16), create_norm(spec, 32)]
    first = [nn.Conv2d(1, 16, 3, padding=1), norms[0], nn.ReLU(), nn.MaxPool2d(2)]
    second = [nn.Conv2d(16, 32, 3, padding=1), norms[1], nn.ReLU(), nn.Flatten(), nn.Linear(512, 10)]
    model = nn.Sequential(*first, *second)
    steps = 8 * 14
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step in range(steps):
        chosen = torch.randperm(1797, generator=torch.Generator().manual_seed(step))[:128]
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
        optimizer.step()
        schedule.step()

    def error() -> float:
        with torch.no_grad():
            return 100 * (model.eval()(images).argmax(1) != labels).double().mean().item()

    right = error()
    assert right < 2
    for norm in norms:
        norm.running_mean += 2
        norm.running_var *= 30
    assert error() > 50
    model.train()
    calibrate_norm(model, images[torch.randperm(1797)].split(128)[:-1])
    assert error() == pytest.approx(right, abs=0.1)


@pytest.mark.slow
# torch.compile itself imports what it says is deprecated.
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_compiled_network_is_calibrated_as_it_was_written():
    plain, twin = network("topk:k=10"), network("topk:k=10")
    compiled = torch.compile(twin, backend="eager")
    compiled(BATCHES[0])
    calibrate_norm(plain, BATCHES)
    calibrate_norm(compiled, BATCHES)
    assert all(torch.equal(value, numbers(twin)[key]) for key, value in numbers(plain).items())


def test_what_is_fused_to_a_norm_stays_in_evaluation():
    norm, alone = create_norm("l1", 3), create_norm("l1", 3)
    norm.add_module("drop", nn.Dropout(0.5))
    model, plain = (nn.Sequential(each, nn.Conv2d(3, 4, 1), create_norm("l1", 4)) for each in (norm, alone))
    plain.load_state_dict(model.state_dict())
    calibrate_norm(model, BATCHES)
    calibrate_norm(plain, BATCHES)
    assert torch.equal(model[2].running_mean, plain[2].running_mean)
