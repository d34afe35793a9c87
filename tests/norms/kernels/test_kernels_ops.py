"""The contract's reference, the operations of torch made of it, and what chooses the backend."""

import contextlib
import copy

import pytest
import torch
from torch import nn

from norm_matters.core.errors import UserError
from norm_matters.norms import create_norm
from norm_matters.norms.kernels import dispatch, ops, reference
from norm_matters.norms.kernels.estimator import Estimator
from norm_matters.norms.l1 import L1Statistic
from norm_matters.norms.l2 import L2Statistic
from norm_matters.norms.memory import saving_memory
from norm_matters.norms.rms import RmsStatistic

ESTIMATORS = [Estimator("l2"), Estimator("l1", 1.2533), Estimator("topk", 0.4, 3), Estimator("topk", 0.3, 1)]
ESTIMATORS.append(Estimator("mean"))
FORMS = [(relu, residual) for relu in (False, True) for residual in (False, True)]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def eps_of(estimator: Estimator) -> float:
    return 0.0 if estimator.kind == "mean" else 1e-3


def definition(x, weight, bias, residual, estimator: Estimator, *, relu: bool):
    """What is computed, as it is written in the paper, for autograd to differentiate. Ties do not occur here."""
    rows = x.transpose(0, 1).flatten(1)
    d = rows - rows.mean(1, keepdim=True)
    if estimator.kind == "l2":
        sigma = d.pow(2).mean(1).sqrt()
    elif estimator.kind == "l1":
        sigma = estimator.constant * d.abs().mean(1)
    elif estimator.kind == "topk":
        sigma = estimator.constant * d.abs().sort(dim=1, descending=True).values[:, : estimator.k].mean(1)
    else:
        sigma = torch.ones_like(d[:, 0])
    normed = d / (sigma**2 + eps_of(estimator)).sqrt()[:, None]
    y = normed * weight[:, None] + bias[:, None]
    y = y.view(x.shape[1], x.shape[0], *x.shape[2:]).transpose(0, 1)
    y = y if residual is None else y + residual
    return torch.clamp(y, min=0) if relu else y


def tensors(*, dtype: torch.dtype = torch.float64, residual: bool) -> list[torch.Tensor | None]:
    x, weight, bias = draw(4, 3, 5, 2, dtype=dtype), draw(3, seed=1, dtype=dtype), draw(3, seed=2, dtype=dtype)
    found = [x, weight, bias, draw(4, 3, 5, 2, seed=3, dtype=dtype) if residual else None]
    return [None if tensor is None else tensor.requires_grad_() for tensor in found]


@pytest.mark.parametrize(("relu", "with_residual"), FORMS)
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_operation_and_its_gradients_in_float64(estimator, relu, with_residual):
    inputs, twins = (tensors(residual=with_residual) for _ in range(2))
    y, stats = ops.normalise(*inputs, estimator, eps=eps_of(estimator), relu=relu)
    expected = definition(*twins, estimator, relu=relu)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert not stats.requires_grad
    grad = draw(*y.shape, seed=4)
    y.backward(grad)
    expected.backward(grad)
    for name, tensor, twin in zip(("x", "weight", "bias", "residual"), inputs, twins, strict=True):
        if tensor is not None:
            torch.testing.assert_close(
                tensor.grad, twin.grad, rtol=1e-10, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}"
            )


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("estimator", ESTIMATORS, ids=str)
def test_second_derivatives(estimator, with_residual):
    inputs = tensors(residual=with_residual)
    given = [tensor for tensor in inputs if tensor is not None]

    def call(*some):
        return ops.normalise(*some, *[None] * (4 - len(some)), estimator, eps=eps_of(estimator), relu=False)[0]

    assert torch.autograd.gradcheck(call, given)
    assert torch.autograd.gradgradcheck(call, given)


def test_second_derivative_of_a_constant_channel_is_finite():
    x = torch.ones(4, 2, 3, dtype=torch.float64).requires_grad_()
    y, _ = ops.normalise(x, None, None, None, Estimator("l2"), eps=1e-3, relu=False)
    (first,) = torch.autograd.grad(y.square().sum() + y.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), x)
    assert torch.isfinite(first).all()
    assert torch.isfinite(second).all()


@pytest.mark.parametrize("tied", [2, 5])
def test_ties_share_the_gradient_of_topk(tied):
    """The k-th place is held by `tied` values: k less the number above are shared among them."""
    x = torch.zeros(8, 1, dtype=torch.float64)
    x[0], x[1 : 1 + tied] = 9.0, 4.0
    x = (x - x.mean()).requires_grad_()
    estimator = Estimator("topk", 1.0, 2)
    stats = reference.measure(x.detach(), estimator)
    d = x.detach() - x.detach().mean()
    order = d.abs().flatten().sort(descending=True).values
    assert stats[3].item() == order[1].item()
    assert stats[4].item() == pytest.approx(1 / (d.abs() == order[1]).sum().item())
    assert stats[1].item() == pytest.approx(order[:2].mean().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("relu", "with_residual"), FORMS)
def test_operation_is_well_behaved(dtype, relu, with_residual):
    """Schema, fake tensors, autograd and compiled dispatch, by torch's own checks."""
    inputs = tensors(dtype=dtype, residual=with_residual)
    arguments = (*inputs, "l1", 1.25, 0, 1e-5, relu)
    torch.library.opcheck(torch.ops.norm_matters.normalise.default, arguments)
    x, weight, bias, residual = (None if tensor is None else tensor.detach() for tensor in inputs)
    y, stats = torch.ops.norm_matters.normalise(x, weight, bias, residual, "l1", 1.25, 0, 1e-5, relu)
    masked = relu and with_residual
    torch.library.opcheck(
        torch.ops.norm_matters.normalise_backward.default,
        (torch.ones_like(y), x, y if masked else None, weight, bias, stats, "l1", 1.25, 0, 1e-5, relu, masked),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.parametrize("spec", ["l1", "l2"])
def test_compiled_block_is_the_eager_one(spec):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = create_norm(spec, 3), create_norm(spec, 3)

        def forward(self, x):
            return self.second(self.first(x, relu=True), x, relu=True)

    torch.compiler.reset()
    plain, twin = Block(), Block()
    compiled = torch.compile(twin, fullgraph=True, backend="aot_eager")
    results = []
    for module in (plain, compiled):
        x = draw(4, 3, 5, 2, dtype=torch.float32).requires_grad_()
        y = module(x)
        y.backward(draw(4, 3, 5, 2, seed=1, dtype=torch.float32))
        results.append([y.detach(), x.grad])
    results[0] += [*plain.state_dict().values(), *[p.grad for p in plain.parameters()]]
    results[1] += [*twin.state_dict().values(), *[p.grad for p in twin.parameters()]]
    torch.testing.assert_close(*results)


def test_norms_go_through_transforms_of_functions():
    """torch.func hands in wrapped tensors, which no kernel may read."""
    norm = create_norm("mean", 3, track_running_stats=False)
    x = draw(2, 4, 3, 5, dtype=torch.float32)
    torch.testing.assert_close(torch.func.vmap(norm)(x), torch.stack([norm(part) for part in x]))
    for spec in ("l2", "mean"):
        norm = create_norm(spec, 3, track_running_stats=False)
        gradient = torch.func.grad(lambda x, norm=norm: norm(x).pow(3).sum())(x[0])
        twin = x[0].clone().requires_grad_()
        norm(twin).pow(3).sum().backward()
        torch.testing.assert_close(gradient, twin.grad)


def test_a_statistic_made_from_another_has_no_kernel():
    """Unless it says so: it would be measured as what it is made from."""

    class Uncentred(L2Statistic):
        centred = False

    class Named(L1Statistic):
        pass

    assert Uncentred().estimator is None
    assert RmsStatistic().estimator is None
    assert Named(2.0).estimator == Estimator("l1", 2.0)


def test_a_dispatch_mode_sees_the_operation():
    class Listen(torch.utils._python_dispatch.TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen: list[str] = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Listen() as listen:
        ops.normalise(draw(2, 3, 4), None, None, None, Estimator("l1"), eps=1e-5, relu=True)
    assert "norm_matters.normalise.default" in listen.seen


def test_choice_of_kernels():
    x = draw(2, 16, 4, 4, dtype=torch.float32)
    with dispatch.kernels("reference"):
        assert not ops.kernel_for(x, Estimator("l1"))
        assert dispatch.total_backend(x, Estimator("l1")) is reference
    assert not ops.kernel_for(x, None)
    assert not ops.kernel_for(x.double(), Estimator("l1"))
    with pytest.raises(UserError, match="kernels: 'referense' is neither auto nor reference; did you mean 'reference'"):
        dispatch.set_kernels("referense")
    named = {row.name: row for row in dispatch.available_backends()}
    assert named["reference"].reason is None
    assert named["cpu"].device == "cpu"
    assert named["triton"].reason is None or isinstance(named["triton"].reason, str)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided"])
def test_residual_and_gradient_of_another_layout(layout):
    """Whatever the layouts are, the result is the same, in the layout of x."""
    norm = create_norm("l1", 16)
    x, residual, grad = (draw(4, 16, 6, 6, seed=seed, dtype=torch.float32) for seed in range(3))
    expected_input = x.clone().requires_grad_()
    expected = norm(expected_input, residual, relu=True)
    expected.backward(grad)
    given = {
        "contiguous": x.clone(),
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "strided": draw(4, 16, 6, 12, dtype=torch.float32)[..., ::2].copy_(x),
    }[layout].requires_grad_()
    y = norm(given, residual.contiguous(memory_format=torch.channels_last), relu=True)
    y.backward(grad.transpose(2, 3).contiguous().transpose(2, 3))
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(given.grad, expected_input.grad)
    if layout == "channels_last":
        assert y.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("saving", [False, True])
@pytest.mark.parametrize("relu", [False, True])
@pytest.mark.parametrize(
    ("x", "residual"),
    [
        (draw(8, 16, 6, 6, dtype=torch.float32), draw(1, 16, 6, 6, seed=1, dtype=torch.float32)),  # the strides of x
        (draw(8, 16, 6, 6, dtype=torch.float32), draw(16, 1, 1, seed=1, dtype=torch.float32)),
        (draw(8, 16, 6, 6, dtype=torch.float32), draw(8, 16, 6, 6, seed=1, dtype=torch.bfloat16)),
        (draw(8, 16, 6, 6, dtype=torch.bfloat16), draw(8, 16, 6, 6, seed=1, dtype=torch.float32)),
        (draw(1, 16, 6, 6, dtype=torch.float32), draw(8, 16, 6, 6, seed=1, dtype=torch.float32)),
    ],
    ids=["one image", "pixel", "narrow", "wide", "more images"],
)
def test_a_residual_of_another_shape_or_dtype_is_added_as_torch_does(x, residual, relu, saving):
    results = []
    for choice in ("reference", "auto"):
        norm, given = create_norm("l1", 16), [x.clone().requires_grad_(), residual.clone().requires_grad_()]
        with dispatch.kernels(choice), saving_memory() if saving else contextlib.nullcontext():
            y = norm(*given, relu=relu)
        y.backward(draw(*y.shape, seed=2, dtype=y.dtype))
        results.append([y.detach(), given[0].grad, given[1].grad, norm.weight.grad, norm.bias.grad])
    # A sum over a broadcast bfloat16 gradient is rounded once at its end.
    narrow = torch.bfloat16 in (x.dtype, residual.dtype)
    torch.testing.assert_close(*results, **({"rtol": 2e-2, "atol": 2e-2} if narrow else {"rtol": 1e-4, "atol": 1e-4}))


def test_autocast_with_a_residual_in_float32():
    """The convolution's output is bfloat16, the residual is not: the sum is float32, as torch's would be."""
    conv, x = nn.Conv2d(4, 16, 1), draw(2, 4, 6, 6, dtype=torch.float32)
    residual = draw(2, 16, 6, 6, seed=1, dtype=torch.float32)
    norm = create_norm("l1", 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = norm(conv(x), residual, relu=True)
        expected = torch.relu(norm(conv(x)) + residual)
    torch.testing.assert_close(y, expected, rtol=0, atol=0)


def test_weight_and_bias_with_gaps():
    given = create_norm("l1", 16)
    given.weight, given.bias = (nn.Parameter(torch.arange(32.0)[start::2]) for start in (0, 1))
    plain = copy.deepcopy(given)
    plain.weight, plain.bias = (nn.Parameter(values.detach().contiguous()) for values in (given.weight, given.bias))
    x = draw(4, 16, 6, 6, dtype=torch.float32)
    assert not given.weight.is_contiguous()
    for norm in (given, plain):
        norm(x).square().sum().backward()
    torch.testing.assert_close(given(x), plain(x), rtol=0, atol=0)
    torch.testing.assert_close(given.weight.grad, plain.weight.grad, rtol=0, atol=0)


@pytest.mark.parametrize("weight", [torch.ones(1), torch.ones(16, device="meta")], ids=["shape", "device"])
def test_a_weight_that_no_kernel_could_read_is_refused(weight):
    norm = create_norm("l1", 16)
    norm.weight = nn.Parameter(weight)
    with pytest.raises(ValueError, match=r"weight and bias must be \(16,\) on cpu, got"):
        norm(draw(4, 16, 6, 6, dtype=torch.float32))
