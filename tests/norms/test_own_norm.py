"""The norm of docs/norms/own.md, run as it stands there: 30 lines, and every tool works on it."""

import copy
import re
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from norm_matters.norms import (
    NORMS,
    absorb_norm,
    calibrate_norm,
    convert_norm,
    create_norm,
    freeze_norm,
    norms_of,
    spec_of,
    sync_norm,
)

PAGE = Path(__file__).parents[2] / "docs" / "norms" / "own.md"


def code() -> str:
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    return next(block for block in blocks if "NORMS.register" in block)


@pytest.fixture(autouse=True)
def own_norm():
    """The page's norm, registered for one test."""
    module = types.ModuleType("norm_of_the_page")
    sys.modules[module.__name__] = module
    exec(compile(code(), str(PAGE), "exec"), module.__dict__)
    yield module
    del sys.modules[module.__name__]
    for table in (NORMS._targets, NORMS._summaries):
        table.pop("clipped")


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def sigma(x: np.ndarray) -> float:
    size = np.abs(x - x.mean())
    return 1.331673 * np.minimum(size, 2 * size.mean()).mean()


def test_it_takes_thirty_lines():
    assert len(code().splitlines()) <= 30


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_its_numbers(dtype):
    x = draw(8, 3, 5, dtype=dtype)
    norm = create_norm("clipped", 3, dtype=dtype, momentum=1.0)
    y, exact = norm(x), x.double()
    expected = torch.tensor([sigma(exact[:, channel].numpy()) for channel in range(3)], dtype=torch.float64)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2}[dtype]
    torch.testing.assert_close(norm.running_var.double(), expected**2, rtol=max(tolerance / 10, 1e-12), atol=0)
    out = (exact - exact.mean((0, 2), keepdim=True)) / (expected**2 + 1e-5).sqrt().view(1, 3, 1)
    torch.testing.assert_close(y.double(), out, rtol=tolerance, atol=tolerance)
    assert create_norm("clipped", 64)(draw(64, 64, 8, 8)).square().mean().item() == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize(
    "spec",
    ["clipped", "group:groups=2,statistic=clipped", "position:statistic=clipped", "ghost:size=2,base=clipped"],
)
def test_its_derivative_wherever_it_is_taken(spec):
    norm = create_norm(spec, 4, dtype=torch.float64)
    assert torch.autograd.gradcheck(norm, (draw(4, 4, 6, dtype=torch.float64).requires_grad_(),))


def test_every_tool_works_on_it():
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4), torch.nn.ReLU())
    assert convert_norm(model, "clipped:momentum=0.5").count == 1
    assert spec_of(model[1]) == "clipped:momentum=0.5"
    x = draw(6, 3, 8, 8)
    model(x).sum().backward()
    assert model[1].weight.grad is not None
    assert model[1].num_batches_tracked == 1
    twin = copy.deepcopy(model)
    twin.load_state_dict(model.state_dict())
    torch.testing.assert_close(twin.eval()(x), model.eval()(x))
    assert calibrate_norm(model, [x]).count == 1
    assert sync_norm(model).count == 1
    freeze_norm(model, affine=False)
    assert spec_of(model[1]) == "clipped:momentum=0.5,sync=true,frozen=stats"
    assert spec_of(create_norm("clipped:frozen=all", 4)) == "clipped:frozen=all"
    y = model.eval()(x)
    assert absorb_norm(model, x).count == 1
    torch.testing.assert_close(model(x), y, rtol=1e-4, atol=1e-5)
    convert_norm(twin, "ghost:size=3,base=clipped")
    assert [spec_of(norm) for _, norm in norms_of(twin)] == ["ghost:size=3,base=clipped,momentum=0.5"]


def test_bad_batches_and_noise_like_it():
    norm = create_norm("clipped", 3)
    bad = draw(8, 3)
    bad[0, 0] = float("inf")
    norm(bad)
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(3))
    constant = create_norm("clipped", 1)(torch.ones(4, 1))
    assert torch.equal(constant, torch.zeros(4, 1))
    # Its estimate varies about as L1's does.
    assert create_norm("clipped", 1).spread(400) == pytest.approx(create_norm("l1", 1).spread(400), rel=0.15)
    create_norm("noisy:like=clipped", 3)(draw(8, 3))


def test_a_name_is_registered_once(own_norm):
    with pytest.raises(ValueError, match="norm 'clipped' is registered already"):
        NORMS.register("clipped", own_norm.ClippedNorm)
