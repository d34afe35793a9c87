"""What each weight norm computes, against numpy in float64; zero vectors, dtypes, layouts, gradients."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.weights import WEIGHT_NORMS, normalise_weights, project, weight_norms_of
from norm_matters.weights.build import canonical_weight_norm, check_weight_norm, resolve_weight_norm

LAYERS = {
    "conv1d": lambda: nn.Conv1d(4, 6, 3),
    "conv2d": lambda: nn.Conv2d(4, 6, 3, bias=False),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2),
    "depthwise 1x1": lambda: nn.Conv2d(4, 4, 1, groups=4),
    "conv3d": lambda: nn.Conv3d(4, 6, 2),
    "transposed1d": lambda: nn.ConvTranspose1d(4, 6, 3),
    "transposed2d": lambda: nn.ConvTranspose2d(4, 6, 3),
    "grouped transposed": lambda: nn.ConvTranspose2d(4, 6, 3, groups=2),
    "transposed3d": lambda: nn.ConvTranspose3d(4, 6, 2),
    "linear": lambda: nn.Linear(4, 6),
}
SPECS = [
    "bounded:p=1",
    "bounded:p=2",
    "bounded:p=inf",
    "bounded:p=2,learn_g=true",
    "bounded:p=1,learn_g=true",
    "projected:p=1",
    "projected:p=2",
    "projected:p=inf",
    "weight",
    "standardised",
    "standardised:gain=2,scaled=true",
]


def rows_of(layer: nn.Module, weight: torch.Tensor) -> np.ndarray:
    """The weights of each output channel as a row, (out, n), by indexing as torch documents the layouts."""
    w = weight.detach().double().numpy()
    if not isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d):
        return w.reshape(len(w), -1)
    per_group_in, per_group_out = w.shape[0] // layer.groups, w.shape[1]
    return np.stack(
        [
            w[group * per_group_in : (group + 1) * per_group_in, channel].ravel()
            for group in range(layer.groups)
            for channel in range(per_group_out)
        ]
    )


def reference(spec: str, v: np.ndarray) -> np.ndarray:
    """The effective weights at the start of training from v, both (channels, n)."""
    name, _, options = spec.partition(":")
    if name == "weight" or "learn_g" in options:
        return v
    if name == "standardised":
        centred = v - v.mean(1, keepdims=True)
        w = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-10)
        return 2 * w / math.sqrt(v.shape[1]) if "scaled" in options else w
    p = {"p=1": 1.0, "p=2": 2.0, "p=inf": math.inf}[options]
    rho = np.abs(v).max() if p == math.inf else ((np.abs(v) ** p).sum() / len(v)) ** (1 / p)
    return rho * v / np.linalg.norm(v, p, axis=1, keepdims=True)


def wrapped(layer: nn.Module, spec: str) -> nn.Module:
    """The layer, its weight normalised; in a model, for alone it would be the last layer."""
    normalise_weights(nn.Sequential(layer, nn.Linear(1, 1)), spec)
    return layer


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", LAYERS)
def test_effective_weights_are_those_of_the_formula(kind, spec):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    v = rows_of(layer, layer.weight)
    wrapped(layer, spec)
    np.testing.assert_allclose(rows_of(layer, layer.weight), reference(spec, v), rtol=1e-12, atol=1e-12)


def test_the_papers_bound_is_one_number_and_stays():
    layer = wrapped(nn.Conv2d(3, 5, 3), "bounded")
    parametrization = layer.parametrizations["weight"][0]
    rho = parametrization.rho.clone()
    assert rho.shape == ()
    with torch.no_grad():
        layer.parametrizations["weight"].original.mul_(torch.rand(5, 1, 1, 1) * 10)
    torch.testing.assert_close(layer.weight.flatten(1).norm(dim=1), rho.expand(5))
    assert torch.equal(parametrization.rho, rho)
    assert [name for name, _ in parametrization.named_parameters()] == []


@pytest.mark.parametrize("p", [1, 2])
def test_the_released_variant_fixes_only_the_length_of_all_g(p):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3)
    initial = layer.weight.detach().flatten(1).norm(p, dim=1)
    wrapped(layer, f"bounded:p={p},learn_g=true")
    parametrization = layer.parametrizations["weight"][0]
    torch.testing.assert_close(parametrization.g.detach(), initial)
    with torch.no_grad():
        parametrization.g.copy_(torch.tensor([1.0, -2.0, 3.0, 4.0, 10.0]))
    norms = layer.weight.flatten(1).norm(p, dim=1)
    torch.testing.assert_close(norms.norm(), initial.norm())
    torch.testing.assert_close(norms / norms[0], torch.tensor([1.0, 2.0, 3.0, 4.0, 10.0]))
    layer.weight.square().sum().backward()
    assert parametrization.g.grad is not None


def test_the_learned_norm_is_the_weights_norm():
    layer = wrapped(nn.Linear(4, 3), "weight")
    with torch.no_grad():
        layer.parametrizations["weight"][0].g.copy_(torch.tensor([1.0, 2.0, 3.0]))
    torch.testing.assert_close(layer.weight.norm(dim=1), torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("kind", ["conv2d", "grouped transposed", "linear"])
def test_gradients_are_those_of_finite_differences(kind, spec):
    torch.manual_seed(0)
    layer = wrapped(LAYERS[kind]().double(), spec)
    parametrization = layer.parametrizations["weight"][0]
    v = layer.parametrizations["weight"].original.detach().requires_grad_()
    assert torch.autograd.gradcheck(parametrization, (v,))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_a_zero_channel_gives_zeros_and_finite_gradients(spec, dtype):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 4, 3)
    with torch.no_grad():
        layer.weight[1] = 0
    wrapped(layer.to(dtype), spec)
    assert layer.weight.dtype == dtype
    assert not layer.weight[1].any()
    assert layer.weight[0].any()
    (layer.weight * torch.randn(4, 3, 3, 3).to(dtype)).sum().backward()
    for name, parameter in layer.parametrizations.named_parameters():
        assert torch.isfinite(parameter.grad).all(), name


@pytest.mark.parametrize("spec", ["bounded:p=1", "bounded:p=2", "bounded:p=inf", "weight", "bounded:learn_g=true"])
def test_a_zero_channel_can_learn(spec):
    """Its direction is that of its first gradient; with a learned scale the second step gives it a length."""
    torch.manual_seed(0)
    layer = nn.Linear(6, 4)
    with torch.no_grad():
        layer.weight[1] = 0
    wrapped(layer, spec)
    optimizer = torch.optim.SGD(layer.parameters(), 0.1)
    for _ in range(2):
        optimizer.zero_grad()
        (layer.weight - 1).square().sum().backward()
        optimizer.step()
    assert (layer.weight[1] > 0.1).all()


@settings(deadline=None, max_examples=40)
@given(scale=st.floats(-17, 15), spec=st.sampled_from(["bounded:p=1", "bounded:p=2", "bounded:p=inf"]))
def test_a_bounded_weight_has_the_bound_at_any_length_and_a_gradient_across_itself(scale, spec):
    torch.manual_seed(0)
    layer = nn.Linear(8, 3)
    v = layer.weight.detach().clone()
    wrapped(layer, spec)
    expected = layer.weight.detach().clone()
    original = layer.parametrizations["weight"].original
    with torch.no_grad():
        original.copy_(v * 10.0**scale)
    torch.testing.assert_close(layer.weight.detach(), expected, rtol=1e-5, atol=1e-6)
    (layer.weight * torch.randn(3, 8)).sum().backward()
    assert torch.isfinite(original.grad).all()
    # Its length has no effect, so the gradient has no part along it.
    along = (original.grad * original).sum(1) / (original.grad.norm(dim=1) * original.norm(dim=1))
    assert along.abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("spec", ["bounded", "bounded:learn_g=true", "weight", "standardised"])
def test_norms_of_half_weights_are_taken_in_float32(spec, dtype):
    """256 weights of 32: the sum of squares, 2^18, is no float16; in bfloat16 a running sum of them stalls."""
    layer = nn.Linear(256, 2)
    with torch.no_grad():
        layer.weight.copy_(torch.where(torch.arange(256) % 2 == 0, 32.0, -32.0))
    layer.to(dtype)
    expected = rows_of(layer, layer.weight)
    wrapped(layer, spec)
    parametrization = layer.parametrizations["weight"][0]
    assert all(buffer.dtype == torch.float32 for buffer in parametrization.buffers())
    found = rows_of(layer, layer.weight) * (32 if spec == "standardised" else 1)
    np.testing.assert_allclose(found, expected, rtol=0.01)


@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
@pytest.mark.parametrize("spec", ["bounded", "projected", "bounded:learn_g=true"])
def test_casting_the_network_keeps_the_bound_in_float32_or_wider(spec, cast):
    layer = wrapped(nn.Conv2d(3, 4, 3), spec)
    rho = layer.parametrizations["weight"][0].rho.clone()
    before = layer.weight.detach().double()
    getattr(layer, cast)()
    after = layer.parametrizations["weight"][0].rho
    assert after.dtype == (torch.float64 if cast == "double" else torch.float32)
    assert torch.equal(after.float(), rho)
    np.testing.assert_allclose(layer.weight.detach().double(), before, rtol=0.02, atol=1e-3)


@pytest.mark.parametrize("p", ["1", "2", "inf"])
def test_projection_puts_the_parameter_itself_back(p):
    torch.manual_seed(0)
    layer = nn.Conv2d(3, 5, 3)
    twin = nn.Conv2d(3, 5, 3)
    twin.load_state_dict(layer.state_dict())
    wrapped(layer, f"projected:p={p}")
    wrapped(twin, f"bounded:p={p}")
    assert torch.equal(layer.weight, twin.weight)
    original = layer.parametrizations["weight"].original
    with torch.no_grad():
        original.add_(torch.randn(5, 3, 3, 3))
    assert torch.equal(layer.weight, original)
    project(layer)
    rho = layer.parametrizations["weight"][0].rho
    torch.testing.assert_close(original.detach().flatten(1).norm(float(p), dim=1), rho.expand(5))


CANONICAL = {
    "bounded": "bounded:p=2",
    " bounded: p = inf ": "bounded:p=inf",
    "bounded:learn_g=true": "bounded:p=2,learn_g=true",
    "bounded:learn_g=false,p=1": "bounded:p=1",
    "projected": "projected:p=2",
    "weight": "weight",
    "standardised:eps=1e-10": "standardised",
    "standardised:scaled=true,gain=1.5": "standardised:gain=1.5,scaled=true",
}


@pytest.mark.parametrize(("text", "canonical"), CANONICAL.items())
def test_canonical_spec(text, canonical):
    assert canonical_weight_norm(text) == canonical
    assert canonical_weight_norm(canonical) == canonical
    layer = wrapped(nn.Linear(2, 2), text)
    assert weight_norms_of(nn.Sequential(layer))["0"].spec == canonical
    assert canonical in str(layer)


@pytest.mark.parametrize(
    ("text", "problem"),
    {
        "bouded": "unknown weight norm 'bouded'; did you mean 'bounded'?",
        "bounded:p=3": "p=3 must be 1 or 2 or inf",
        "bounded:p=2.0": "p=2.0 must be 1 or 2 or inf",
        "bounded:q=3": "has no option 'q'",
        "bounded:1": "weight norm 'bounded:1': '1' is no KEY=VALUE; write e.g. bounded:p=1",
        "bounded:learn_g=yes": "learn_g=yes must be true or false",
        "projected:learn_g=true": "has no option 'learn_g'",
        "weight:p=2": "has no option 'p'; it takes none",
        "standardised:gain=0": "gain=0 must be a number above 0",
        "standardised:eps=0": "eps=0 must be a number above 0",
        "": "does not start with a name",
    }.items(),
)
def test_wrong_spec(text, problem):
    for refuse in (check_weight_norm, canonical_weight_norm, resolve_weight_norm):
        with pytest.raises(UserError) as caught:
            refuse(text)
        assert problem in str(caught.value)
        assert "\n" not in str(caught.value)


def test_every_weight_norm_has_a_summary_and_its_name():
    check_weight_norm(None)
    for name in WEIGHT_NORMS.names():
        assert WEIGHT_NORMS.summary(name)
        assert WEIGHT_NORMS.get(name).name == name
