"""Derivatives by finite differences, second derivatives, in-place activations, memory kept, compilation."""

import copy
import pickle

import pytest
import torch

from norm_matters.norms import create_norm
from norm_matters.norms.kernels.dispatch import kernels

SPECS = ["l2", "l1", "linf", "topk:k=4", "lp:p=1.5", "lp:p=3", "mean", "mean:scale=true", "group:groups=2", "layer"]
SPECS += ["range", "ghost:size=2,base=l1"]
# Norms whose training depends on the batches before, or on chance.
STATEFUL = ["smooth:base=l1", "renorm:base=l1", "noisy:base=l1"]
ANALYTIC = ["l1", "linf", "topk:k=4", "lp:p=3", "range", "smooth"]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def as_function(spec: str, channels: int = 4):
    """The norm as a function of input and parameters, in float64."""
    norm = create_norm(spec, channels, dtype=torch.float64, track_running_stats=False)
    names = [name for name, _ in norm.named_parameters()]
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(0))

    def call(x: torch.Tensor, *parameters: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(norm, dict(zip(names, parameters, strict=True)), (x,))

    return call, [parameter.detach().clone().requires_grad_() for parameter in norm.parameters()]


def without_tracking(spec: str) -> bool:
    return spec.split(":")[0] in ("group", "layer", "instance")


@pytest.mark.parametrize("spec", [spec for spec in SPECS if not without_tracking(spec)])
@pytest.mark.parametrize("shape", [(6, 4), (3, 4, 5), (2, 4, 3, 2)])
def test_gradcheck(spec, shape):
    call, parameters = as_function(spec)
    x = draw(*shape, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(call, (x, *parameters))


@pytest.mark.parametrize("spec", ["group:groups=2", "layer"])
def test_gradcheck_of_norms_per_image(spec):
    norm = create_norm(spec, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, (draw(3, 4, 5, dtype=torch.float64).requires_grad_(),))


@pytest.mark.parametrize("spec", ["topk:k=4", "linf"])
def test_gradcheck_beside_a_tie(spec):
    """The dense derivative, taken where some channel has a tie, is right in the channels that have none."""
    call, parameters = as_function(spec)
    x = draw(5, 4, 3, dtype=torch.float64)
    x[:, 3] = 1.0
    free = x[:, :3].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda part: call(torch.cat([part, x[:, 3:]], 1), *parameters)[:, :3], (free,))


@pytest.mark.parametrize("spec", ANALYTIC)
def test_second_derivative_is_refused(spec):
    """Where no kernel computes it: what stands for those has them (test_kernels_ops.py)."""
    norm = create_norm(spec, 3)
    x = draw(4, 3, 5).requires_grad_()
    with kernels("reference"):
        (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("spec", ["l2", "mean"])
def test_second_derivative_is_right(spec):
    call, parameters = as_function(spec, 2)
    x = draw(4, 2, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradgradcheck(call, (x, *parameters))


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("training", [True, False])
def test_activation_in_place_behind_the_norm(spec, training):
    gradients = []
    for in_place in (True, False):
        x = draw(4, 4, 5).requires_grad_()
        norm = create_norm(spec, 4).train(training)
        torch.nn.functional.relu(norm(x), inplace=in_place).square().sum().backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("spec", ["l2", "l1", "linf", "topk:k=4", "topk:k=900", "lp:p=3", "mean", "range", *STATEFUL])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_the_input_and_numbers_per_channel(spec, dtype):
    x = draw(32, 4, 8, 8, dtype=dtype).requires_grad_()
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        create_norm(spec, 4)(x)
    others = [t for t in kept if t.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()]
    assert sum(t.numel() for t in others) <= 4 * 16


@pytest.mark.parametrize("spec", SPECS + STATEFUL)
def test_frozen_input_and_frozen_parameters(spec):
    norm = create_norm(spec, 4)
    norm(draw(4, 4, 5)).sum().backward()
    assert norm.bias.grad is not None
    norm.requires_grad_(False)
    x = draw(4, 4, 5).requires_grad_()
    norm(x).square().sum().backward()
    assert torch.isfinite(x.grad).all()


@pytest.mark.parametrize("spec", [*SPECS, *STATEFUL, "frozen"])
def test_copies_are_independent(spec):
    norm = create_norm(spec, 4)
    x = draw(4, 4, 5)
    norm(x)
    for twin in (copy.deepcopy(norm), pickle.loads(pickle.dumps(norm))):
        assert twin.spec == norm.spec
        before = {key: value.clone() for key, value in norm.state_dict().items()}
        assert torch.equal(twin.eval()(x), copy.deepcopy(norm).eval()(x))
        twin.train()(x)
        assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def compare_compiled(spec: str, backend: str, shapes: list[tuple[int, ...]]) -> None:
    plain, twin = create_norm(spec, 4), create_norm(spec, 4)
    compiled = torch.compile(twin, fullgraph=True, backend=backend)
    for shape in shapes:
        x, g = draw(*shape), draw(*shape, seed=1)
        results = []
        for norm in (plain, compiled):
            leaf = x.clone().requires_grad_()
            norm.zero_grad()
            torch.manual_seed(0)
            y = norm(leaf)
            y.backward(g)
            results.append((y, leaf.grad, *(p.grad for p in norm.parameters())))
        for a, b in zip(*results, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
        for key, value in plain.state_dict().items():
            torch.testing.assert_close(twin.state_dict()[key], value, rtol=1e-5, atol=1e-6)


# torch.compile itself makes an object of torch.autograd.Function, and warns that one should not.
tolerated = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@tolerated
def test_compiles_in_one_graph():
    compare_compiled("topk:k=4", "aot_eager", [(3, 4, 5)])


@tolerated
def test_compiled_norm_with_a_memory_keeps_what_it_found():
    """The backward pass must not read buffers again that the forward pass has moved."""
    torch.compiler.reset()
    compare_compiled("renorm:base=l1,r_max=1.2", "aot_eager", [(3, 4, 5), (3, 4, 5)])


@pytest.mark.slow
@tolerated
@pytest.mark.parametrize(
    "spec", [*SPECS, *STATEFUL, "frozen", "lp:p=30", "topk:k=999", "l1:momentum=none", "none", "instance"]
)
def test_each_norm_compiles_in_one_graph(spec):
    torch.compiler.reset()
    compare_compiled(spec, "aot_eager", [(3, 4, 5), (6, 4, 5)])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's code generator uses what torch has deprecated
@pytest.mark.parametrize("spec", ["l1", "topk:k=4"])
def test_compiled_code_has_the_same_numbers(spec):
    torch.compiler.reset()
    compare_compiled(spec, "inductor", [(3, 4, 5)])


@tolerated
def test_second_derivative_of_compiled_norm_is_refused():
    torch.compiler.reset()
    norm = torch.compile(create_norm("l1", 3), fullgraph=True, backend="aot_eager")
    x = draw(4, 3, 5).requires_grad_()
    (dx,) = torch.autograd.grad(norm(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        dx.sum().backward()
