"""Outputs of norms that are made again in the backward pass instead of being kept."""

import contextlib
import copy
import gc

import pytest
import torch
from torch import nn

from norm_matters.models import MODELS
from norm_matters.norms import create_norm, memory, norm_factory
from norm_matters.norms.kernels.dispatch import kernels
from norm_matters.norms.memory import saving_memory

SPECS = [
    *("l2", "l1", "linf", "topk:k=5", "lp:p=3", "range", "rms", "mean", "none", "ghost:size=3,base=l1"),
    *("smooth:base=l1", "renorm:base=l2", "noisy:base=l2,like=linf", "group:groups=4", "layer:statistic=l1"),
    *("instance", "position", "l1:stats_format=fp16", "frozen"),
]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def network(spec: str | None, **options) -> nn.Module:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d if spec is None else norm_factory(spec)
    settings = {"width": 8, "stem": "small", **options}
    return MODELS.get("resnet50").build(num_classes=5, in_channels=3, norm=norm, **settings)


def step(model: nn.Module, x: torch.Tensor, *, saving: bool) -> list[torch.Tensor]:
    """Scores, gradients and buffers after one forward and backward pass."""
    torch.manual_seed(1)
    with saving_memory() if saving else contextlib.nullcontext():
        scores = model(x)
    scores.square().sum().backward()
    return [scores.detach(), *[p.grad for p in model.parameters() if p.grad is not None], *model.buffers()]


def assert_equal(found: list[torch.Tensor], expected: list[torch.Tensor]) -> None:
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(
    ("spec", "choice"), [*((spec, "auto") for spec in SPECS), *((spec, "reference") for spec in ("l2", "l1", "mean"))]
)
def test_gradients_are_equal_to_the_bit(spec, choice):
    model = network(spec).to(memory_format=torch.channels_last)
    twin, x = copy.deepcopy(model), draw(6, 3, 16, 16)
    with kernels(choice):
        assert_equal(step(model, x, saving=True), step(twin, x, saving=False))


def kept_bytes(model: nn.Module, x: torch.Tensor, *, saving: bool) -> int:
    """The memory of all activations that live between the forward and the backward pass."""
    gc.collect()
    seen: dict[int, int] = {}

    class Live(torch.utils._python_dispatch.TorchDispatchMode):
        """Knows of every tensor an operation makes; which of them live on is asked afterwards."""

        def __init__(self):
            super().__init__()
            self.storages: list = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            for tensor in result if isinstance(result, (tuple, list)) else (result,):
                if isinstance(tensor, torch.Tensor):
                    storage = tensor.untyped_storage()
                    self.storages.append((torch.multiprocessing.reductions.StorageWeakRef(storage), storage.nbytes()))
            return result

    with Live() as live, saving_memory() if saving else contextlib.nullcontext():
        scores = model(x)
    gc.collect()
    for reference, size in live.storages:
        if not reference.expired():
            seen[reference.cdata] = size
    scores.sum().backward()
    return sum(seen.values())


@pytest.mark.parametrize("spec", ["l1", "l2", "linf", "group:groups=4"])
def test_what_was_made_again_is_let_go(spec):
    """At the end of the backward pass nothing is held: every use was counted once."""
    held = []

    class Watched(memory._Remake):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            held.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "_Remake", Watched)
        step(network(spec), draw(6, 3, 16, 16), saving=True)
    assert len(held) > 50
    assert [remake.uses for remake in held if remake.uses] == []
    assert not any(isinstance(remake._held, torch.Tensor) for remake in held)


@pytest.mark.parametrize("spec", ["l1", "l2", "linf", "group:groups=4"])
def test_half_of_the_activations_is_kept(spec):
    """Beside nn.BatchNorm2d and a ReLU in place, as others have it."""
    x = draw(6, 3, 32, 32)
    plain = kept_bytes(network(None), x, saving=False)
    saved = kept_bytes(network(spec), x, saving=True)
    assert saved < 0.6 * plain
    # And not because less is asked for: without saving it is as much as theirs.
    assert kept_bytes(network(spec), x, saving=False) > 0.9 * plain


def chain(norm: nn.Module, *layers: nn.Module):
    return nn.Sequential(nn.Conv2d(3, 4, 1), norm, *layers)


def test_an_output_that_is_overwritten_is_kept():
    """A ReLU of somebody else's, in place, behind the norm: what the convolution needs is the overwritten one."""
    model = chain(create_norm("l1", 4), nn.LeakyReLU(0.1, inplace=True), nn.Conv2d(4, 5, 1), nn.Flatten())
    twin, x = copy.deepcopy(model), draw(6, 3, 8, 8)
    assert_equal(step(model, x, saving=True), step(twin, x, saving=False))


@pytest.mark.parametrize("choice", ["auto", "reference"])
@pytest.mark.parametrize("spec", ["l1", "l2", "linf", "mean", "group:groups=2"])
@pytest.mark.parametrize("overwritten", ["input", "residual", "bias"])
def test_what_is_needed_and_overwritten_is_an_error(overwritten, spec, choice):
    """As autograd has it without hooks; and where only the output that is made again needs it."""
    norm, conv = create_norm(spec, 4), nn.Conv2d(4, 5, 1)
    h, residual = (draw(3, 4, 6, 6, seed=seed).requires_grad_().clone() for seed in range(2))
    with kernels(choice), saving_memory():
        y = conv(norm(h, residual, relu=True))
    with torch.no_grad():
        {"input": h, "residual": residual, "bias": norm.bias}[overwritten].zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_mask_is_taken_from_the_output_as_it_was():
    gradients = []
    for overwrite in (False, True):
        h = draw(3, 4, 6, 6).requires_grad_()
        with saving_memory():
            y = create_norm("linf", 4)(h, relu=True)
        if overwrite:
            y.detach().zero_()
        y.backward(draw(3, 4, 6, 6, seed=1))
        gradients.append(h.grad)
    assert torch.equal(*gradients)


def test_views_of_an_output():
    model = chain(create_norm("l1", 4), nn.ReLU(), nn.Flatten(), nn.Linear(256, 3))
    twin, x = copy.deepcopy(model), draw(6, 3, 8, 8)
    assert_equal(step(model, x, saving=True), step(twin, x, saving=False))


def test_a_graph_that_is_used_twice():
    model, x = network("l1", width=4), draw(4, 3, 8, 8)
    twin = copy.deepcopy(model)
    for module, context in ((model, saving_memory()), (twin, contextlib.nullcontext())):
        with context:
            loss = module(x).square().sum()
        loss.backward(retain_graph=True)
        loss.backward()
    assert_equal([p.grad for p in model.parameters()], [p.grad for p in twin.parameters()])


def test_evaluation_and_frozen_statistics():
    model, x = network("l1", width=4), draw(4, 3, 8, 8)
    model(x)
    twin = copy.deepcopy(model.eval())
    assert_equal(step(model, x, saving=True), step(twin, x, saving=False))


def test_autocast():
    model, x = network("l1", width=4), draw(4, 3, 8, 8)
    twin = copy.deepcopy(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_equal(step(model, x, saving=True), step(twin, x, saving=False))


def test_nothing_lives_on():
    """Neither the graph nor the ways to make outputs again outlive the backward pass."""
    model, x = network("l1", width=4), draw(4, 3, 8, 8)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
        for _ in range(3):
            step(model, x, saving=True)
            model.zero_grad()
        assert sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects()) <= before
    finally:
        gc.enable()
