"""Weight norms in networks: what is wrapped and refused, copies and files, compilation, removal, initialisation."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrize

from norm_matters.core.errors import UserError
from norm_matters.models import create_model
from norm_matters.norms import create_norm
from norm_matters.weights import (
    bound_weights,
    initialise_weight,
    last_layer,
    normalise_weights,
    project,
    remove_weight_norm,
    weight_norms_of,
)

SPECS = ["bounded:p=2", "bounded:p=inf", "bounded:p=2,learn_g=true", "projected:p=1", "weight", "standardised"]


def network(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        create_norm("mean", 8),
        nn.ReLU(),
        nn.Sequential(nn.ConvTranspose2d(8, 4, 2, groups=2), nn.ReLU()),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.ReLU(),
        nn.Linear(8, 5),
    )


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def train(model: nn.Module, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for _ in range(steps):
        optimizer.zero_grad()
        model(images()).square().mean().backward()
        optimizer.step()
        project(model)


def test_every_layer_but_the_last_is_wrapped_and_reported():
    model = network()
    report = bound_weights(model)
    assert report.rows == [
        ("0", "Conv2d", "bounded:p=2", ""),
        ("3.0", "ConvTranspose2d", "bounded:p=2", ""),
        ("6", "Linear", "bounded:p=2", ""),
    ]
    assert [row[:3] for row in report.left] == [("8", "Linear", "Linear")]
    assert report.count == 3
    assert "3.0    ConvTranspose2d  bounded:p=2" in str(report)
    assert list(weight_norms_of(model)) == ["0", "3.0", "6"]
    assert type(model[8]) is nn.Linear


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, "6", ["0", "3.0"]),
        ("3.*", None, ["3.0"]),
        (["0", "8"], None, ["0", "8"]),
        ("*", ["0", "3.*"], ["6", "8"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    """The last layer is wrapped when it is asked for."""
    assert [row[0] for row in bound_weights(network(), include=include, exclude=exclude).rows] == expected


@pytest.mark.parametrize(
    ("p", "learn_g", "spec"), [(1, False, "bounded:p=1"), (2.0, True, "bounded:p=2,learn_g=true"), ("inf", False, None)]
)
def test_bound_weights_is_the_bounded_spec(p, learn_g, spec):
    assert bound_weights(network(), p, learn_g=learn_g).rows[0][2] == (spec or "bounded:p=inf")
    assert bound_weights(network(), float("inf")).rows[0][2] == "bounded:p=inf"
    with pytest.raises(UserError, match="p=3 must be 1 or 2 or inf"):
        bound_weights(network(), 3)


@pytest.mark.parametrize("spec", SPECS)
def test_the_parameters_stay_the_same_objects_where_they_were(spec):
    model = network().double()
    model[0].weight.requires_grad_(False)
    weight, requires = model[0].weight, model[0].weight.requires_grad
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    normalise_weights(model, spec)
    wrapped = model[0].parametrizations["weight"]
    assert wrapped.original is weight
    assert any(parameter is wrapped.original for parameter in optimizer.param_groups[0]["params"])
    assert all(parameter.requires_grad == requires for parameter in wrapped.parameters())
    assert {tensor.dtype for tensor in [*wrapped.parameters(), *wrapped.buffers()]} == {torch.float64}
    assert model[0].weight.dtype == torch.float64
    on_meta = network().to("meta")
    normalise_weights(on_meta, spec)
    assert {tensor.device.type for tensor in on_meta.state_dict().values()} == {"meta"}


def test_a_layer_in_two_places_is_wrapped_once():
    shared = nn.Conv2d(4, 4, 1)
    model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared, nn.Linear(4, 2))})
    assert [row[0] for row in bound_weights(model).rows] == ["a.0"]
    assert len(model["a"][0].parametrizations["weight"]) == 1
    assert bound_weights(nn.ModuleList([nn.Conv2d(1, 1, 1), shared, nn.Linear(1, 1)]), include="0").count == 1


@pytest.mark.parametrize("spec", SPECS)
def test_a_weight_in_two_layers_stays_one(spec):
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2))
    model[1].weight = model[0].weight
    normalise_weights(model, spec)
    assert model[0].parametrizations["weight"].original is model[1].parametrizations["weight"].original
    model(torch.randn(3, 4)).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(0.1 * parameter.grad)
    assert torch.equal(model[0].weight, model[1].weight)


def test_a_weight_that_serves_a_plain_layer_too_is_refused():
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 6, bias=False), nn.Linear(6, 2))
    model[1].weight = model[0].weight
    with pytest.raises(ValueError, match=r"'0\.weight' is also the weight of a layer to be normalised"):
        bound_weights(model)
    both = nn.Sequential(nn.Conv2d(4, 4, 1), nn.ConvTranspose2d(4, 4, 1), nn.Linear(4, 2))
    both[1].weight = both[0].weight
    with pytest.raises(ValueError, match="is also the weight"):
        bound_weights(both)


def test_an_error_changes_nothing():
    for change, message in (
        (lambda m: nn.init.zeros_(m[6].weight), "layer '6': its weights have the norm 0"),
        (lambda m: nn.init.constant_(m[6].weight, float("nan")), "layer '6': its weights have the norm nan"),
        (
            lambda m: nn.utils.parametrizations.orthogonal(m[6]),
            "layer '6': its weight is parametrized already, by _Orth",
        ),
        (lambda m: m.append(nn.utils.parametrizations.weight_norm(nn.Linear(5, 5))), "no error"),
        (lambda m: m.insert(6, nn.LazyLinear(16)), "layer '6': its weight has no shape yet"),
        (lambda m: bound_weights(m, include="6"), "layer '6': its weight is parametrized already, by bounded:p=2"),
        (lambda m: m.append(torch.compile(nn.Linear(5, 5), backend="eager")), "layer '9' is wrapped .OptimizedModule."),
        (lambda m: m.append(nn.DataParallel(nn.Linear(5, 5))), "layer '9' is wrapped .DataParallel."),
        (lambda m: m.compile(backend="eager"), "the model is wrapped .compiled module."),
    ):
        model = network()
        change(model)
        if message == "no error":
            assert bound_weights(model).count == 4
            continue
        shapeless = nn.parameter.UninitializedParameter
        before = {name: t.clone() for name, t in model.state_dict().items() if not isinstance(t, shapeless)}
        with pytest.raises(ValueError, match=message):
            bound_weights(model)
        assert set(weight_norms_of(model)) <= {"6"}
        for name, tensor in before.items():
            torch.testing.assert_close(model.state_dict()[name], tensor, equal_nan=True, rtol=0, atol=0)


def test_nothing_to_wrap_is_refused():
    with pytest.raises(ValueError, match=r"include and exclude leave none of 0, 3\.0, 6, 8"):
        bound_weights(network(), include="nothing")
    with pytest.raises(ValueError, match="the model has no convolution and no linear layer"):
        bound_weights(nn.ReLU())
    with pytest.raises(ValueError, match="the only layer with a weight, '0', is the last one; include it by its name"):
        bound_weights(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="no weight of the model is normalised"):
        remove_weight_norm(network())


def test_last_layer_is_found_by_the_parameters():
    assert last_layer(network()) == "8"
    assert last_layer(nn.Sequential(nn.Linear(2, 4), nn.Unflatten(1, (2, 2)), nn.LayerNorm((2, 2)))) == "0"
    assert last_layer(nn.ReLU()) is None
    assert last_layer(nn.Linear(2, 2)) == ""
    assert last_layer(nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))) == ""


@pytest.mark.parametrize("spec", SPECS)
def test_copies_are_independent(spec):
    model = network()
    normalise_weights(model, spec)
    before = model(images())
    twin = copy.deepcopy(model)
    assert torch.equal(twin.eval()(images()), model.eval()(images()))
    train(twin.train())
    assert torch.equal(model.train()(images()), before)
    assert not torch.equal(twin(images()), before)
    # The copy shares the class that torch made for the original.
    remove_weight_norm(twin)
    assert torch.equal(model(images()), before)
    averaged = torch.optim.swa_utils.AveragedModel(model)
    averaged.update_parameters(model)
    assert averaged(images()).shape == (4, 5)


@pytest.mark.parametrize("spec", SPECS)
def test_files_restore_everything_in_a_fresh_model(spec, tmp_path):
    model = network()
    normalise_weights(model, spec)
    train(model)
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    fresh = network(seed=9)
    normalise_weights(fresh, spec)
    fresh.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    assert torch.equal(fresh.eval()(images()), model.eval()(images()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(fresh.state_dict()[name], tensor), name
    assert ("0.parametrizations.weight.0.rho" in model.state_dict()) == spec.startswith(("bounded", "projected"))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_removal_leaves_the_effective_weight(spec, dtype):
    model = network().to(dtype, memory_format=torch.channels_last)
    normalise_weights(model, spec)
    train(model.float())
    model.to(dtype).eval()
    x = images().to(dtype)
    weight, before = model[0].parametrizations["weight"].original, model(x)
    assert remove_weight_norm(model).rows[0] == ("0", spec, "Conv2d", "")
    assert torch.equal(model(x), before)
    assert model[0].weight is weight
    assert type(model[0]) is nn.Conv2d
    assert list(model.state_dict()) == list(network().state_dict())
    train(model.float())


def test_removal_refuses_what_others_put_on_top():
    model = network()
    bound_weights(model)

    class Twice(nn.Module):
        def forward(self, weight):
            return 2 * weight

    parametrize.register_parametrization(model[0], "weight", Twice())
    with pytest.raises(ValueError, match="layer '0' has another parametrization on top of bounded:p=2"):
        remove_weight_norm(model)
    assert len(weight_norms_of(model)) == 3


def test_removal_keeps_the_parametrization_of_a_bias():
    model = network()
    bound_weights(model)
    parametrize.register_parametrization(model[0], "bias", nn.Tanh())
    before = model(images())
    remove_weight_norm(model)
    assert torch.equal(model(images()), before)
    assert parametrize.is_parametrized(model[0], "bias")


@pytest.mark.parametrize("spec", SPECS)
def test_evaluation_and_training_forwards_change_no_parameter(spec):
    model = network()
    normalise_weights(model, spec)
    train(model)
    before = {name: tensor.clone() for name, tensor in model.named_parameters()}
    bounds = {name: tensor.clone() for name, tensor in model.named_buffers() if name.endswith("rho")}
    model(images())
    model.eval()(images())
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.named_parameters())
    assert all(torch.equal(dict(model.named_buffers())[name], tensor) for name, tensor in bounds.items())


QUICK = [("eager", "bounded:p=2,learn_g=true"), ("aot_eager", "bounded:p=2")]
COMPILED = [(backend, spec) for backend in ("eager", "aot_eager", "inductor") for spec in SPECS]


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
@pytest.mark.parametrize(
    ("backend", "spec"),
    [*QUICK, *[pytest.param(*pair, marks=pytest.mark.slow) for pair in COMPILED if pair not in QUICK]],
)
def test_compiled_networks_give_the_same_numbers(backend, spec):
    torch.compiler.reset()
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.ConvTranspose2d(8, 4, 2, groups=2), nn.Flatten())
    model.append(nn.Linear(100, 5))
    normalise_weights(model, spec)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    x = images()
    expected = model(x)
    gradients = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
    found = compiled(x)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    for gradient, again in zip(
        gradients, torch.autograd.grad(found.square().sum(), list(model.parameters())), strict=True
    ):
        torch.testing.assert_close(again, gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("spec", ["weight", "bounded:p=2,learn_g=true"])
@pytest.mark.parametrize("name", ["resnet8", "vgg11"])
def test_our_networks_start_with_their_own_weights(name, spec):
    """Trap 6 of the released code: what was drawn for the network is what it starts with."""
    torch.manual_seed(0)
    plain = create_model(name, num_classes=4, width=8)
    torch.manual_seed(0)
    model = create_model(name, num_classes=4, width=8, weight_norm=spec)
    assert weight_norms_of(model)
    for path, layer in plain.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            effective = model.get_submodule(path).weight
            if spec == "weight":
                assert torch.equal(effective, layer.weight), path
            else:
                torch.testing.assert_close(effective, layer.weight, rtol=1e-5, atol=0)


@pytest.mark.parametrize("spec", ["bounded:p=2", "projected:p=2"])
def test_bounded_networks_start_with_their_own_directions_and_he_s_norm(spec):
    torch.manual_seed(0)
    plain = create_model("resnet8", num_classes=4, width=16)
    torch.manual_seed(0)
    model = create_model("resnet8", num_classes=4, width=16, weight_norm=spec)
    for path, layer in plain.named_modules():
        if not isinstance(layer, nn.Conv2d):
            continue
        v, w = layer.weight.flatten(1), model.get_submodule(path).weight.flatten(1)
        torch.testing.assert_close(torch.cosine_similarity(v, w), torch.ones(len(v)))
        torch.testing.assert_close(w.norm(dim=1), v.square().sum(1).mean().sqrt().expand(len(v)))


@pytest.mark.parametrize("spec", ["bounded:p=2", "projected:p=2", "weight", "bounded:p=2,learn_g=true"])
def test_initialisation_after_wrapping_holds_when_it_is_assigned(spec):
    """Trap 6: `nn.init` on a normalised weight writes to a temporary; both ways that hold start the norm anew."""
    model = network()
    normalise_weights(model, spec)
    optimizer_sees = [id(parameter) for parameter in model.parameters()]
    train(model)
    fresh = 10 * torch.randn(8, 3, 3, 3, generator=torch.Generator().manual_seed(3))
    model[0].weight = fresh.clone()
    initialise_weight(model[6], nn.init.constant_, val=0.5)
    norms = fresh.flatten(1).norm(dim=1)
    expected = norms if "learn_g" in spec or spec == "weight" else norms.square().mean().sqrt().expand(8)
    torch.testing.assert_close(model[0].weight.flatten(1).norm(dim=1), expected)
    torch.testing.assert_close(model[6].weight.detach(), torch.full((8, 16), 0.5))
    assert [id(parameter) for parameter in model.parameters()] == optimizer_sees
    train(model)


def test_a_plain_layer_is_initialised_likewise():
    layer = nn.Linear(3, 2)
    weight = layer.weight
    initialise_weight(layer, nn.init.ones_)
    assert layer.weight is weight
    assert (weight == 1).all()
