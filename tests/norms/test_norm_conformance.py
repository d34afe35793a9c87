"""Every registered norm with every tool: the tool acts, or refuses and names the layer and its spec.

A norm joins by being registered. Where its name alone is no spec, its class says one in the attribute `example`.
"""

import copy
import re
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint

from norm_matters.engine.precision import PRECISIONS
from norm_matters.norms import (
    NORMS,
    absorb_norm,
    calibrate_norm,
    convert_norm,
    create_norm,
    freeze_norm,
    name_norms,
    sync_norm,
    unfreeze_norm,
)
from norm_matters.norms.base import Norm
from norm_matters.regimes.groups import group_parameters

every_norm = pytest.mark.parametrize("name", NORMS.names())


def network(name: str, seed: int = 0, **options) -> nn.Sequential:
    """A convolution, the norm, and what makes scores of it; in training mode."""
    torch.manual_seed(seed)
    layers = {
        "conv": nn.Conv2d(3, 16, 3),
        "norm": create_norm(example_spec(name), 16, **options),
        "act": nn.Tanh(),
        "head": nn.Conv2d(16, 5, 2),
        "flat": nn.Flatten(),
    }
    model = nn.Sequential(OrderedDict(layers))
    name_norms(model)
    return model


def example_spec(name: str) -> str:
    if name == "timm" and find_spec("timm") is None:
        pytest.skip("timm is not installed")
    return getattr(NORMS.get(name), "example", name)


def draw(seed: int, count: int = 12) -> Tensor:
    return torch.randn(count, 3, 6, 6, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def train(model: nn.Module, steps: int = 3, **options) -> None:
    """A few steps of SGD."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05, **options)
    for step in range(steps):
        torch.manual_seed(step)
        optimizer.zero_grad()
        model(draw(step)).square().mean().backward()
        optimizer.step()


def has(model: nn.Sequential, capability: str) -> bool:
    return capability in model.norm.capabilities()


def takes_batch_statistics(norm: Norm) -> bool:
    return "sync" in norm.capabilities() and not getattr(norm, "stats_frozen", False)


def state(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def statistics(norm: Norm) -> dict[str, Tensor]:
    return {key: value for key, value in state(norm).items() if key.startswith(("running", "num"))}


@contextmanager
def refused(norm: Norm) -> Iterator[None]:
    """The tool raises, names the layer and its spec, and changes nothing."""
    before, spec = state(norm), norm.spec
    with pytest.raises(ValueError, match=re.escape(f"'norm' ({spec})")):
        yield
    assert norm.spec == spec
    assert same(state(norm), before)


@every_norm
def test_its_capabilities_are_what_it_shows(name):
    model = network(name)
    norm = model.norm
    if has(model, "affine"):
        assert {key for key, _ in norm.named_parameters()} & {"weight", "bias"}
    if has(model, "running_stats"):
        scale, shift = (part.view(-1, 1, 1) for part in norm.eval_affine())
        z = model.conv(draw(0)).double()
        y = copy.deepcopy(norm).double().eval()(z)
        torch.testing.assert_close(y, z * scale + shift, rtol=1e-12, atol=1e-12)
    x = draw(0).clone()
    torch.manual_seed(0)
    before = norm(model.conv(x))[0]
    x[1:] *= 3
    torch.manual_seed(0)
    after = norm(model.conv(x))[0]
    assert takes_batch_statistics(norm) == (not torch.equal(before, after))


@every_norm
def test_freezing_statistics(name):
    model = network(name)
    if not has(model, "running_stats"):
        with refused(model.norm):
            freeze_norm(model, affine=False)
        return
    unfreeze_norm(model)
    train(model)
    report = freeze_norm(model, affine=False)
    assert report.count == 1
    assert report.rows[0].after == model.norm.spec
    assert model.norm.frozen == "stats"
    before = statistics(model.norm)
    model.train()
    assert torch.equal(model(draw(7)), copy.deepcopy(model).eval()(draw(7)))
    train(model)
    assert same(statistics(model.norm), before)
    # It is part of the spec: a norm built from that does the same.
    rebuilt = create_norm(model.norm.spec, 16)
    rebuilt.load_state_dict(model.norm.state_dict())
    z = model.conv(draw(7))
    assert torch.equal(rebuilt(z), model.norm(z))
    assert same(statistics(rebuilt), before)
    unfreeze_norm(model, affine=False)
    assert model.norm.frozen is None
    train(model)
    assert not same(statistics(model.norm), before)


@every_norm
def test_freezing_weight_and_bias(name):
    model = network(name)
    if not has(model, "affine"):
        with refused(model.norm):
            freeze_norm(model, stats=False)
        return
    unfreeze_norm(model)
    before = {key: value.detach().clone() for key, value in model.norm.named_parameters()}
    conv = model.conv.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=0.1)
    model(draw(0)).square().mean().backward()
    freeze_norm(model, stats=False)
    assert create_norm(model.norm.spec, 16).weight is None or not create_norm(model.norm.spec, 16).weight.requires_grad
    optimizer.step()
    train(model, weight_decay=0.1)
    assert same({key: value.detach() for key, value in model.norm.named_parameters()}, before)
    assert not torch.equal(model.conv.weight, conv)
    unfreeze_norm(model, stats=False)
    assert model.norm.frozen is None
    train(model, weight_decay=0.1)
    assert not any(torch.equal(value, before[key]) for key, value in model.norm.named_parameters())


@every_norm
def test_calibration(name):
    """The statistics become the averages over the batches, weighted by their numbers of images."""
    model = network(name)
    batches = [draw(seed, count) for seed, count in ((1, 12), (2, 12), (3, 5))]
    if not has(model, "running_stats"):
        with refused(model.norm):
            calibrate_norm(model, batches)
        return
    if model.norm.stats_frozen:
        with refused(model.norm):
            calibrate_norm(model, batches)
        unfreeze_norm(model)
    model.norm.running_mean.fill_(9)
    model.norm.running_var.fill_(100)
    mean, var = torch.zeros(16, dtype=torch.float64), torch.zeros(16, dtype=torch.float64)
    for batch in batches:
        seen = []
        model.norm.observer = lambda *found, seen=seen: seen.append(found)
        model(batch)
        mean += len(batch) / 29 * seen[0][0]
        var += len(batch) / 29 * seen[0][1]
    model.norm.observer = None
    weights = {key: value.detach().clone() for key, value in model.named_parameters()}
    report = calibrate_norm(model, batches)
    assert (report.count, report.batches, report.rejected) == (1, 3, 0)
    torch.testing.assert_close(model.norm.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
    if model.norm.estimates_sigma:
        torch.testing.assert_close(model.norm.running_var.double(), var, rtol=1e-5, atol=1e-6)
    assert model.norm.num_batches_tracked == 3
    assert model.training
    assert same({key: value.detach() for key, value in model.named_parameters()}, weights)


@every_norm
def test_absorbing(name):
    model = network(name)
    train(model)
    model.eval()
    if not has(model, "running_stats"):
        with refused(model.norm):
            absorb_norm(model, draw(0))
        return
    before = model(draw(7))
    report = absorb_norm(model, draw(0))
    assert report.count == 1
    assert type(model.norm) is nn.Identity
    after = model(draw(7))
    assert (after - before).abs().max() <= 1e-4 * before.abs().max()
    assert report.relative <= 1e-4
    assert not torch.equal(model.conv.weight, network(name).conv.weight)


@every_norm
def test_synchronising(name):
    model, alone = network(name), network(name)
    if not has(model, "sync"):
        with refused(model.norm):
            sync_norm(model)
        return
    sync_norm(model)
    assert create_norm(model.norm.spec, 16).sync
    # On one rank it changes nothing; on several, see test_norm_sync.py.
    for seed in range(2):
        torch.manual_seed(seed)
        shared = model(draw(seed))
        torch.manual_seed(seed)
        assert torch.equal(shared, alone(draw(seed)))
    assert same(state(model), state(alone))


@every_norm
def test_weight_decay_groups(name):
    model = network(name)
    names = [key for key, _ in model.named_parameters()]
    groups = group_parameters(model, names, ["norm"])
    assert groups.get("norm", []) == [key for key in names if key.startswith("norm.")]
    assert groups["rest"] == ["conv.weight", "conv.bias", "head.weight", "head.bias"]


@every_norm
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_leaves_it_in_float32(name, precision):
    model = network(name)
    PRECISIONS[precision].convert(model)
    half = PRECISIONS[precision].weights
    assert model.conv.weight.dtype == half
    assert all(tensor.dtype == torch.float32 for tensor in model.norm.parameters())
    assert all(tensor.dtype == torch.float32 for tensor in model.norm.buffers() if tensor.is_floating_point())
    y = model(draw(0).to(half))
    y.float().square().mean().backward()
    assert y.dtype == half
    assert all(torch.isfinite(value.grad).all() for value in model.parameters() if value.requires_grad)


@every_norm
@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_statistics_once(name, reentrant):
    plain, checkpointed = network(name), network(name)
    x = draw(0).requires_grad_()
    gradients = []
    for model, run in (
        (plain, lambda x: plain(x)),
        (checkpointed, lambda x: checkpoint(checkpointed, x, use_reentrant=reentrant)),
    ):
        torch.manual_seed(5)
        run(x).square().mean().backward()
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    assert same(state(checkpointed), state(plain))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@every_norm
def test_deep_copy(name):
    model = network(name)
    train(model)
    twin = copy.deepcopy(model)
    outputs = []
    for each in (model, twin):
        torch.manual_seed(3)
        outputs.append(each(draw(3)))
    assert torch.equal(*outputs)
    assert twin.norm.spec == model.norm.spec
    before = state(twin)
    train(model)
    assert same(state(twin), before)


@every_norm
def test_weights_return_from_a_file(name):
    model, fresh = network(name), network(name, seed=1)
    train(model)
    fresh.load_state_dict(load(save(model.state_dict())), strict=True)
    assert torch.equal(fresh.eval()(draw(4)), model.eval()(draw(4)))


@every_norm
def test_conversion_to_it_and_back(name):
    torch.manual_seed(0)
    model = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 16, 3), norm=nn.BatchNorm2d(16), act=nn.Tanh()))
    for seed in range(3):
        model(draw(seed))
    before = model.eval()(draw(4))
    weight = model.norm.weight
    assert convert_norm(model, example_spec(name)).count == 1
    assert type(model.norm) is NORMS.get(name)
    assert not model.norm.training
    if has(model, "running_stats") and model.norm.weight is weight and model.norm.estimates_sigma:
        torch.testing.assert_close(model(draw(4)), before, rtol=1e-5, atol=1e-5)
        convert_norm(model, "l2")
        assert model.norm.weight is weight
        torch.testing.assert_close(model(draw(4)), before, rtol=1e-5, atol=1e-5)
    else:
        # It is another function: what it shares is carried over, and the rest is finite.
        assert model(draw(4)).isfinite().all()
        assert getattr(model.norm, "weight", None) in (None, weight)


@every_norm
def test_averaged_weights(name):
    """An average's parameters are averages; its statistics belong to no network, and are calibrated."""
    model = network(name)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    expected = {key: value.detach().clone() for key, value in model.named_parameters()}
    for step in range(3):
        train(model, steps=1)
        average.update_parameters(model)
        for key, value in model.named_parameters():
            expected[key] = value.detach().clone() if step == 0 else expected[key].lerp(value.detach(), 0.5)
    averaged = dict(average.module.named_parameters())
    assert averaged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(averaged[key].detach(), value)
    if has(model, "running_stats") and not model.norm.stats_frozen:
        average.module.norm.running_mean.fill_(9)
        batches = [draw(seed) for seed in range(4)]
        calibrate_norm(average, batches)
        z = torch.stack([average.module.conv(batch) for batch in batches]).detach()
        if model.norm.statistic_for(z[0, :, 0].numel()).centred:
            torch.testing.assert_close(average.module.norm.running_mean, z.mean((0, 1, 3, 4)), rtol=1e-4, atol=1e-5)
    assert average.eval()(draw(4)).isfinite().all()


@every_norm
def test_gradient_accumulation(name):
    """Two halves of a batch give the gradient of the whole where nothing is taken over the batch; else they do not."""
    model = network(name).double()
    x = draw(0).double()
    gradients = []
    for chunks in ([x], x.chunk(2)):
        model.zero_grad()
        for chunk in chunks:
            torch.manual_seed(0)
            (model(chunk).square().mean() * (len(chunk) / len(x))).backward()
        gradients.append(model.conv.weight.grad.clone())
    exact = torch.allclose(*gradients, rtol=1e-9, atol=1e-12)
    assert exact == (not takes_batch_statistics(model.norm))
