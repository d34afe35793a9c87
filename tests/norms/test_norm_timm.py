"""Norms of timm's tables under our contract."""

import copy
import importlib.util
import pickle

import pytest
import torch

import norm_matters.core.torchvision  # noqa: F401  (before timm)
from norm_matters.core.errors import UserError
from norm_matters.norms import convert_norm, create_norm, freeze_norm, norms_of
from norm_matters.norms.timm import timm_norms

pytest.importorskip("timm")


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def names() -> list[str]:
    return sorted({key for table in timm_norms() for key in table})


@pytest.mark.parametrize("act", [False, True])
@pytest.mark.parametrize("name", names())
def test_every_norm_of_timm_has_its_own_numbers(name, act):
    """Outputs, gradients, names and state, in training and evaluation."""
    plain, fused = timm_norms()
    kind = fused.get(name) if act else plain.get(name, fused.get(name))
    if kind is None:
        with pytest.raises(UserError, match=f"{name} has no activation"):
            create_norm(f"timm:{name},act=true", 32)
        return
    theirs = kind(32) if kind is plain.get(name) else kind(32, apply_act=act)
    ours = create_norm(f"timm:{name},act={str(act).lower()}", 32)
    assert [key for key, _ in ours.named_parameters()] == [key for key, _ in theirs.named_parameters()]
    ours.load_state_dict(theirs.state_dict())
    channels_last = ours.channel_dim == -1
    x = draw(4, 3, 3, 32) if channels_last else draw(4, 32) if name == "batchnorm1d" else draw(4, 32, 3, 3)
    for training in (True, False):
        leaves = [x.clone().requires_grad_() for _ in range(2)]
        outputs = []
        for norm, leaf in zip((ours, theirs), leaves, strict=True):
            outputs.append(norm.train(training)(leaf))
            outputs[-1].square().sum().backward()
        assert torch.equal(*outputs)
        assert torch.equal(leaves[0].grad, leaves[1].grad)
    for key, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[key], value)


def test_it_is_one_layer_with_one_set_of_tensors():
    norm = create_norm("timm:batchnorm", 4)
    assert [name for name, _ in norms_of(torch.nn.Sequential(norm))] == ["0"]
    x = draw(8, 4, 3, 3)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        before = norm.running_mean.clone()
        twin(x)
        with torch.no_grad():
            twin.weight.fill_(3)
        assert twin(x).square().mean().item() == pytest.approx(9, rel=0.01)
        assert torch.equal(norm.running_mean, before)
        assert twin.running_mean.abs().sum() > 0
        assert torch.equal(norm.weight, torch.ones(4))
    norm.double()
    assert norm(x.double()).dtype == norm.running_var.dtype == torch.float64
    placed = create_norm("timm:groupnorm1", 4, device="meta", dtype=torch.bfloat16)
    assert (placed.weight.device.type, placed.weight.dtype) == ("meta", torch.bfloat16)


def test_options():
    x = draw(4, 8, 3, 3)
    grouped = create_norm("timm:groupnorm,groups=4,eps=0.5", 8)
    torch.testing.assert_close(grouped(x), torch.nn.functional.group_norm(x, 4, eps=0.5))
    assert grouped.spec == "timm:groupnorm,eps=0.5,groups=4"
    assert create_norm("timm:layernorm", 8).channel_dim == -1
    for spec, problem in {
        "timm:groupnorm": "cannot be built for 8 channels",
        "timm:groupnorm,groups=3": "cannot be built for 8 channels",
        "timm:evonorms0,groups=3": "8 channels do not divide into 3 groups",
        "timm:frn,groups=2": "frn has no groups",
        "timm:iabn": "timm has no norm 'iabn'",
    }.items():
        with pytest.raises(UserError, match=problem):
            create_norm(spec, 8)


def test_wrong_shapes_name_the_layer():
    for spec in ("timm:frn", "timm:batchnorm", "timm:rmsnorm2d"):
        with pytest.raises(ValueError, match=r"TimmNorm takes no input of shape \(4, 8\)"):
            create_norm(spec, 8)(draw(4, 8))


def test_without_timm(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "timm" else found(name))
    with pytest.raises(UserError, match="timm is not installed; pip install"):
        create_norm("timm:frn", 4)


def test_conversion_and_tools():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
    weight = model[1].weight
    convert_norm(model, "timm:frn")
    assert model[1].weight is weight
    model(draw(2, 3, 8, 8)).sum().backward()
    assert weight.grad is not None
    with pytest.raises(ValueError, match=r"layer '1' \(timm:frn"):
        freeze_norm(model)
