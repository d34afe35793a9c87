"""The contract of design.md: state, dtypes, checkpoints; and that the traps of the released code are not here."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.norms import NORMS, convert_norm, create_norm

COMPOSITES = ["ghost:base=l1", "smooth", "renorm:base=l1", "noisy"]
BATCH = ["l2", "l1", "linf", "topk", "lp:p=3", "mean", "range", *COMPOSITES]
AFFINE = ["l2", "l1", "linf", "topk", "lp:p=3", "mean:scale=true", "range", *COMPOSITES, "group", "layer", "instance"]
# A spec that each registered norm can be built from.
BUILDABLE = ["timm:frn" if name == "timm" else name for name in NORMS.names()]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("spec", BATCH)
def test_trap_1_momentum_is_the_weight_of_the_new_batch(spec):
    norm = create_norm(spec, 2, momentum=0.25)
    norm(draw(64, 2, 4) + 8)
    torch.testing.assert_close(norm.running_mean, torch.full((2,), 2.0), rtol=0.1, atol=0)


@pytest.mark.parametrize("spec", BATCH)
def test_trap_2_running_var_is_a_variance_that_starts_at_one(spec):
    norm, x = create_norm(spec, 2), draw(64, 2, 16)
    assert torch.equal(norm.running_var, torch.ones(2))
    # Before any training, evaluation is the identity, not a constant.
    torch.testing.assert_close(norm.eval()(x), x, rtol=1e-4, atol=1e-4)
    if spec != "mean":
        norm.train()
        for seed in range(60):
            norm(3 * draw(64, 2, 16, seed=seed))
        torch.testing.assert_close(norm.running_var, torch.full((2,), 9.0), rtol=0.15, atol=0)
        rms = norm.eval()(3 * x).square().mean().sqrt().item()
        assert rms == pytest.approx(1, abs=0.08)


@pytest.mark.parametrize("spec", AFFINE)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_trap_3_affine_parameters_are_initialised(spec, device):
    norm = create_norm(spec, 8, device=device)
    if device == "meta":
        norm.to_empty(device="cpu")
        for tensor in (*norm.parameters(), *norm.buffers()):
            tensor.fill_(7) if not tensor.requires_grad else tensor.data.fill_(7)
        norm.reset_parameters()
    assert torch.equal(norm.weight, torch.ones(8))
    assert torch.equal(norm.bias, torch.zeros(8))
    if hasattr(norm, "running_var"):
        assert torch.equal(norm.running_var, torch.ones(8))
        assert torch.equal(norm.running_mean, torch.zeros(8))
        assert norm.num_batches_tracked == 0


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk", "lp:p=3", "range"])
def test_trap_4_eps_is_in_units_of_variance(spec):
    """With eps = 4 the output is smaller by sqrt(sigma^2 / (sigma^2 + 4)), in training and in evaluation."""
    x = draw(64, 2, 16)
    free = create_norm(spec, 2, eps=1e-12, momentum=1.0)
    y = free(x)
    var = free.running_var.double() * (1023 / 1024 if spec == "l2" else 1)
    shrink = (var / (var + 4)).sqrt().float().view(1, 2, 1)
    norm = create_norm(spec, 2, eps=4.0, momentum=1.0)
    torch.testing.assert_close(norm(x), y * shrink, rtol=1e-4, atol=1e-5)
    in_eval = (x - norm.running_mean.view(1, 2, 1)) / (norm.running_var.view(1, 2, 1) + 4).sqrt()
    torch.testing.assert_close(norm.eval()(x), in_eval)


@pytest.mark.parametrize("k", [1, 3, 10, 100])
def test_trap_5_each_k_has_its_own_constant_applied_once(k):
    x = draw(64, 64, 4, 4)
    assert create_norm(f"topk:k={k}", 64)(x).std().item() == pytest.approx(1, abs=0.02)
    # Two-sided: the sign of the extremes does not matter.
    one_sided = torch.where(x.abs() > 2, x.abs(), x)
    torch.testing.assert_close(create_norm(f"topk:k={k}", 64)(-one_sided), -create_norm(f"topk:k={k}", 64)(one_sided))


def test_trap_8_choosing_a_norm_changes_nothing_outside_the_model():
    batch_norm, forward = nn.BatchNorm2d, nn.BatchNorm2d.forward
    for spec in BUILDABLE:
        create_norm(spec, 8)
    other = nn.Sequential(nn.BatchNorm2d(8))
    convert_norm(nn.Sequential(nn.BatchNorm2d(8)), "l1")
    assert nn.BatchNorm2d is batch_norm
    assert nn.BatchNorm2d.forward is forward
    assert type(other[0]) is batch_norm
    with pytest.raises(UserError, match="unknown norm"):
        create_norm("L1BatchNorm", 8)


@pytest.mark.parametrize("spec", BUILDABLE)
def test_trap_9_torchs_conversion_to_synchronised_norm_leaves_ours(spec):
    norm = create_norm(spec, 8)
    assert not isinstance(norm, nn.modules.batchnorm._BatchNorm)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(nn.Sequential(norm))
    assert model[0] is norm


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk", "lp:p=3", "range", "ghost", "renorm", "noisy", "frozen"])
def test_state_is_that_of_torchs_batch_norm(spec):
    ours, theirs = create_norm(spec, 4), nn.BatchNorm2d(4)
    for norm in (ours, theirs):
        norm(draw(8, 4, 3, 3))
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    x = draw(8, 4, 3, 3, seed=1)
    torch.testing.assert_close(theirs.eval()(x), ours.eval()(x), rtol=1e-6, atol=1e-6)
    ours.load_state_dict(nn.BatchNorm2d(4).state_dict())
    assert torch.equal(ours.running_var, torch.ones(4))


def test_weights_older_than_num_batches_tracked_load():
    state = nn.BatchNorm2d(4).state_dict()
    state._metadata[""]["version"] = 1
    del state["num_batches_tracked"]
    norm = create_norm("l1", 4)
    norm.load_state_dict(state)
    assert norm.num_batches_tracked == 0
    state._metadata[""]["version"] = 2
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        norm.load_state_dict(state)


@pytest.mark.parametrize("spec", BATCH)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_statistics_stay_in_float32_under_half(spec, half):
    norm = create_norm(spec, 4)
    norm(draw(8, 4, 3))
    mean = norm.running_mean.clone()
    for cast in (norm.to(half), norm.half() if half == torch.float16 else norm.bfloat16()):
        assert cast.bias.dtype == half
        assert cast.running_mean.dtype == cast.running_var.dtype == torch.float32
        assert torch.equal(cast.running_mean, mean)
    nn.Sequential(norm).to(half)
    assert torch.equal(norm.running_mean, mean)
    norm(draw(8, 4, 3).to(half))
    assert norm.double().running_mean.dtype == torch.float64
    assert norm.half().running_mean.dtype == torch.float32
    assert norm.to("meta").running_mean.device.type == "meta"
    assert create_norm(spec, 4, dtype=half).running_var.dtype == torch.float32


@pytest.mark.parametrize("spec", [*BATCH, "none", "group", "layer", "instance"])
def test_evaluation_changes_nothing(spec):
    norm = create_norm(spec, 8)
    norm(draw(8, 8, 3))
    norm.eval()
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    first, x = norm(draw(1, 8, 5)), draw(8, 8, 3)
    norm(x)
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())
    assert torch.equal(norm(draw(1, 8, 5)), first)


def test_package_is_lazy():
    """Importing the package, and asking which norms there are, loads no torch."""
    code = (
        "import sys, norm_matters.norms as n; n.NORMS.names(); n.NORMS.summary('l1');"
        "assert not {'torch', 'numpy', 'timm', 'torchvision'} & set(sys.modules);"
        "assert all(hasattr(n, name) for name in n.__all__);"
        "n.create_norm('l1', 4); assert 'timm' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
