"""Conversion of built networks: what is carried over, what is refused, and that an error changes nothing."""

import pytest
import torch
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.norms import convert_norm, create_norm, norms_of, spec_of


def network() -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8))
    )
    for _ in range(3):
        model(torch.randn(4, 3, 6, 6, generator=torch.Generator().manual_seed(0)))
    return model


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:k=10", "lp:p=3"])
def test_conversion_keeps_the_network_in_evaluation(spec):
    model = network().eval()
    x = torch.randn(2, 3, 6, 6)
    before, keys = model(x), list(model.state_dict())
    report = convert_norm(model, spec)
    assert report.count == 2
    assert report.rows == [("1", "BatchNorm2d", spec), ("3.1", "BatchNorm2d", spec)]
    assert "3.1" in str(report)
    assert [spec_of(norm) for _, norm in norms_of(model)] == [spec, spec]
    torch.testing.assert_close(model(x), before, rtol=1e-6, atol=1e-6)
    assert list(model.state_dict()) == keys
    model.train()(x).sum().backward()


def test_what_is_carried_over():
    old = nn.BatchNorm1d(4, eps=0.125, momentum=None, dtype=torch.float64)
    old(torch.randn(8, 4, dtype=torch.float64))
    old.weight.requires_grad_(False)
    model = nn.ModuleDict({"a": old, "b": nn.BatchNorm3d(4, affine=False, track_running_stats=False).eval()})
    weight, mean = old.weight, old.running_mean.clone()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    convert_norm(model, "l1")
    new = model["a"]
    assert (new.eps, new.momentum, new.training) == (0.125, None, True)
    assert new.weight is weight
    assert not new.weight.requires_grad
    assert new.bias is optimizer.param_groups[0]["params"][1]
    assert torch.equal(new.running_mean, mean)
    assert new.running_mean.dtype == torch.float64
    assert new.num_batches_tracked == 1
    assert model["b"].weight is None
    assert model["b"].running_mean is None
    assert not model["b"].training


def test_spec_and_options_go_before_the_old_layer():
    model = nn.Sequential(nn.BatchNorm2d(4, eps=0.25, momentum=0.5))
    convert_norm(model, "l1:eps=0.125", momentum=0.75, stats_dtype="input")
    assert model[0].spec == "l1:momentum=0.75,eps=0.125,stats_dtype=input"


def test_half_network_gets_float32_statistics():
    model = nn.Sequential(nn.BatchNorm2d(4)).half()
    convert_norm(model, "l1")
    assert model[0].weight.dtype == torch.float16
    assert model[0].running_mean.dtype == model[0].running_var.dtype == torch.float32


@pytest.mark.parametrize("spec", ["group:groups=2", "layer", "instance", "mean", "mean:scale=true", "none"])
def test_conversion_to_other_kinds(spec):
    model = network()
    weights = [norm.weight for _, norm in norms_of(model)]
    assert convert_norm(model, spec).count == 2
    model(torch.randn(4, 3, 6, 6)).sum().backward()
    if spec in ("group:groups=2", "layer", "instance", "mean:scale=true"):
        assert all(norm.weight is weight for (_, norm), weight in zip(norms_of(model), weights, strict=True))
    if spec.startswith("mean"):
        # Its sigma is 1: another norm's estimate has no place in it.
        assert all(torch.equal(norm.running_var, torch.ones(8)) for _, norm in norms_of(model))
        assert norms_of(model)[0][1].running_mean.abs().max() > 0


def test_our_norms_are_converted_too():
    model = nn.Sequential(create_norm("mean", 4, momentum=0.5), create_norm("l1:eps=0.25", 4))
    report = convert_norm(model, "topk:k=2")
    assert report.rows == [
        ("0", "mean:momentum=0.5", "topk:k=2,momentum=0.5"),
        ("1", "l1:eps=0.25", "topk:k=2,eps=0.25"),
    ]


def test_tied_layers_stay_one_layer():
    shared = nn.BatchNorm1d(4)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.BatchNorm1d(4))})
    model["b"][1].weight = shared.weight
    assert convert_norm(model, "l1").count == 2
    assert model["a"][0] is model["b"][0]
    assert model["b"][1].weight is model["a"][0].weight


@pytest.mark.parametrize(
    ("include", "exclude", "converted"),
    [(None, "3.*", ["1"]), ("3.*", None, ["3.1"]), (["1", "3.1"], "1", ["3.1"]), ("*", [], ["1", "3.1"])],
)
def test_include_and_exclude(include, exclude, converted):
    report = convert_norm(network(), "l1", include=include, exclude=exclude)
    assert [name for name, _, _ in report.rows] == converted


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"spec": "l1", "include": "nothing"}, "leave none of 1, 3.1"),
        ({"spec": "l1", "exclude": "*"}, "leave none of"),
        ({"spec": "l9"}, "unknown norm 'l9'"),
        ({"spec": "group:groups=3"}, "8 channels do not divide into 3"),
    ],
)
def test_an_error_changes_nothing(arguments, message):
    model = network()
    before = list(model.modules())
    with pytest.raises((ValueError, UserError), match=message):
        convert_norm(model, **arguments)
    assert list(model.modules()) == before


def test_refusals():
    with pytest.raises(ValueError, match="no batch norm"):
        convert_norm(nn.Sequential(nn.Linear(2, 2)), "l1")
    for norm in (nn.BatchNorm2d(4), create_norm("l1", 4)):
        with pytest.raises(ValueError, match="itself a norm"):
            convert_norm(norm, "l1")

    class Special(nn.BatchNorm2d):
        pass

    model = nn.Sequential(nn.BatchNorm2d(4), Special(4))
    with pytest.raises(ValueError, match="layer '1' is a Special"):
        convert_norm(model, "l1")
    assert type(model[0]) is nn.BatchNorm2d


def test_synchronised_batch_norm_is_converted():
    model = nn.Sequential(nn.SyncBatchNorm(4))
    assert convert_norm(model, "l1").rows == [("0", "SyncBatchNorm", "l1")]


def test_timms_fused_activation_is_kept():
    import norm_matters.core.torchvision  # noqa: F401  (timm needs it on a CPU build of torch)

    layers = pytest.importorskip("timm.layers")
    model = nn.Sequential(layers.BatchNormAct2d(4, act_layer=nn.PReLU), layers.BatchNormAct2d(4, apply_act=False))
    keys = list(model.state_dict())
    x = torch.randn(4, 4, 3, 3)
    expected = model(x)
    report = convert_norm(model, "l2")
    assert report.rows == [("0", "BatchNormAct2d", "l2"), ("1", "BatchNormAct2d", "l2")]
    torch.testing.assert_close(model(x), expected)
    assert isinstance(model[0].act, nn.PReLU)
    assert set(model.state_dict()) == set(keys)
    convert_norm(model, "none")
    assert isinstance(model[0].act, nn.PReLU)
