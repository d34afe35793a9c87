"""The C kernels against their definition in float64, differentiated by autograd."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from norm_matters.core.errors import UserError
from norm_matters.norms.kernels import cpu
from norm_matters.norms.kernels.estimator import Estimator

L2 = Estimator("l2")
_REASON = cpu.reason_against(torch.zeros(2, 3), L2)
pytestmark = pytest.mark.skipif(_REASON is not None, reason=str(_REASON))

ESTIMATORS = [Estimator("l2"), Estimator("l1", 1.25), Estimator("mean")]
DTYPES = [torch.float32, torch.bfloat16]
FORMS = [(False, False), (True, False), (False, True), (True, True)]  # relu, add
SHAPES = [
    (4, 3, 5, 5),
    (3, 17, 1, 1),
    (7, 1, 3, 3),
    (5, 33, 7, 7),
    (3, 20, 9, 9),
    (2, 5, 16, 17),
    (1, 3, 70, 71),
    (6, 20),
    (2, 16),
    (3, 8, 19),
    (2, 3, 4, 5, 6),
    (130, 16, 2, 2),
    (67, 3, 13, 13),
]


@pytest.fixture(autouse=True)
def best_simd():
    yield
    cpu.use_simd(None)


def _eps(estimator: Estimator) -> float:
    return 0.0 if estimator.kind == "mean" else 1e-5


def _last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.channels_last_3d)


def _sigma(d: Tensor, estimator: Estimator, dims: list[int]) -> Tensor:
    if estimator.kind == "l2":
        return d.square().mean(dims, keepdim=True).sqrt()
    if estimator.kind == "l1":
        return estimator.constant * d.abs().mean(dims, keepdim=True)
    return torch.ones_like(d.mean(dims, keepdim=True))


def _check(
    x: Tensor,
    g: Tensor,
    estimator: Estimator,
    *,
    relu: bool,
    residual: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Compare forward, apply and backward with the definition."""
    eps, channels = _eps(estimator), x.shape[1]
    assert cpu.reason_against(x, estimator) is None
    kept = x.clone()
    y, stats = cpu.forward(x, weight, bias, residual, estimator, eps=eps, relu=relu)
    assert torch.equal(cpu.apply(x, weight, bias, residual, stats, eps=eps, relu=relu), y)
    masked_sum = relu and residual is not None
    gradients = cpu.backward(
        g, x, y if masked_sum else None, weight, bias, stats, estimator, eps=eps, relu=relu, has_residual=masked_sum
    )
    assert torch.equal(x, kept)
    assert (y.dtype, y.shape, y.stride()) == (x.dtype, x.shape, x.stride())

    dims, over = [0, *range(2, x.ndim)], [1, channels] + [1] * (x.ndim - 2)
    wide_x = x.double().requires_grad_()
    wide_w = torch.ones(channels).double() if weight is None else weight.double()
    wide_b = torch.zeros(channels).double() if bias is None else bias.double()
    wide_r = None if residual is None else residual.double().requires_grad_()
    wide_w.requires_grad_(), wide_b.requires_grad_()
    mean = wide_x.mean(dims, keepdim=True)
    sigma = _sigma(wide_x - mean, estimator, dims)
    r = (sigma.square() + eps).rsqrt()
    whole = (wide_x - mean) * r * wide_w.view(over) + wide_b.view(over)
    if wide_r is not None:
        whole = whole + wide_r
    # A value next to 0 may be rounded to either side: the mask of the reference is the one under test.
    passed = (y > 0).double() if relu else torch.ones_like(whole)
    (whole * passed).backward(g.double())
    reach = (wide_x.detach().abs().amax(dims, keepdim=True) * r * wide_w.view(over).abs() + 1).detach()
    unit = 2.0**-8 if x.dtype == torch.bfloat16 else 2.0**-22

    assert stats.shape == (5, channels)
    assert stats.dtype == torch.float32
    assert not stats[3:].any()
    largest = wide_x.detach().abs().amax(dims).clamp_min(1e-30)
    assert ((stats[0] - mean.flatten()).abs() / largest).max() < 2e-7
    assert ((stats[1] - sigma.flatten()).abs() / largest).max() < 1e-6
    expected = whole.detach().relu() if relu else whole.detach()
    assert ((y.double() - expected).abs() / (reach + expected.abs())).max() < unit

    dx, dweight, dbias, dresidual = gradients
    scale = (r * wide_w.view(over).abs()).detach() * (g.double().abs().amax(dims, keepdim=True) + 1e-30)
    count = x.numel() // channels
    assert (dx.dtype, dx.stride()) == (x.dtype, x.stride())
    assert wide_x.grad is not None
    # r d is at most sqrt(n) or so, and multiplies what stands in dweight.
    assert ((dx.double() - wide_x.grad).abs() / (scale * reach + 1e-12)).max() < (
        unit if x.dtype == torch.bfloat16 else 1e-5
    )
    assert wide_w.grad is not None
    assert wide_b.grad is not None
    biggest = g.double().abs().max() * count
    assert ((dweight - wide_w.grad).abs() / reach.flatten()).max() < 1e-6 * biggest
    assert (dbias - wide_b.grad).abs().max() < 1e-6 * biggest
    if masked_sum:
        assert dresidual is not None
        assert torch.equal(dresidual, torch.where(y > 0, g, torch.zeros_like(g)))
        assert dresidual.stride() == x.stride()
    else:
        assert dresidual is None


def _example(shape: tuple[int, ...], dtype: torch.dtype, last: bool, seed: int = 0) -> list[Tensor]:
    """x, grad and residual."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator).to(dtype) for _ in range(3)]
    made[0] = made[0] * 2 + 1
    return [_last(tensor) for tensor in made] if last else made


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("simd", ["avx512", "avx2", "baseline"])
def test_definition(simd: str, shape: tuple[int, ...], dtype: torch.dtype, last: bool) -> None:
    if last and len(shape) < 4:
        pytest.skip("no channels_last of that shape")
    if simd not in cpu.simd_names():
        pytest.skip("not on this machine")
    cpu.use_simd(simd)
    x, g, residual = _example(shape, dtype, last)
    weight, bias = torch.linspace(-1.5, 1.5, shape[1]), torch.linspace(1.0, -1.0, shape[1])
    for estimator, (relu, add) in itertools.product(ESTIMATORS, FORMS):
        _check(x, g, estimator, relu=relu, residual=residual if add else None, weight=weight, bias=bias)
    _check(x, g, ESTIMATORS[1], relu=True, residual=None, weight=None, bias=None)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(
    shape=st.lists(st.integers(1, 40), min_size=2, max_size=2).flatmap(
        lambda head: st.lists(st.integers(1, 23), max_size=3).map(lambda tail: (*head, *tail))
    ),
    data=st.data(),
)
def test_random_shapes(shape: tuple[int, ...], data: st.DataObject) -> None:
    if torch.Size(shape).numel() > 200_000 or torch.Size(shape).numel() < 2 * shape[1]:
        return
    last = len(shape) >= 4 and data.draw(st.booleans())
    relu, add = data.draw(st.sampled_from(FORMS))
    x, g, residual = _example(shape, data.draw(st.sampled_from(DTYPES)), last, data.draw(st.integers(0, 99)))
    cpu.use_simd(data.draw(st.sampled_from(cpu.simd_names())))
    weight = torch.linspace(0.5, 1.5, shape[1]) if data.draw(st.booleans()) else None
    residual = residual if add else None
    _check(x, g, data.draw(st.sampled_from(ESTIMATORS)), relu=relu, residual=residual, weight=weight, bias=None)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(16, 5, 40, 40), (16, 37, 7, 7), (64, 19)], ids=["planes", "tiles", "rows"])
def test_mean_far_from_zero(shape: tuple[int, ...], last: bool) -> None:
    """As good as native batch norm, and next to what float32 can hold of the input's mean."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 1e-2 + 1e3
    x = _last(x) if last and x.ndim == 4 else x
    dims = [0, *range(2, x.ndim)]
    for simd in cpu.simd_names():
        cpu.use_simd(simd)
        _, l2 = cpu.forward(x, None, None, None, Estimator("l2"), eps=0.0, relu=False)
        _, l1 = cpu.forward(x, None, None, None, Estimator("l1"), eps=0.0, relu=False)
        mean = x.double().mean(dims, keepdim=True)
        d = x.double() - mean
        assert (l2[0] - mean.flatten()).abs().max() <= 2.0**-14 * 0.51  # half a unit in the last place
        assert (l2[1] / d.square().mean(dims).sqrt() - 1).abs().max() < 1e-6
        d = x.double() - mean.float()
        assert (l1[1] / d.abs().mean(dims) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=lambda estimator: estimator.kind)
@pytest.mark.parametrize("shape", [(3, 4, 17, 19), (9, 40, 7, 7), (50, 3)], ids=["planes", "tiles", "rows"])
def test_constant_channel(shape: tuple[int, ...], estimator: Estimator) -> None:
    x, g, _ = _example(shape, torch.float32, False)
    x[:, 1], x[:, 2] = 0.1, 0.0
    bias = torch.arange(shape[1], dtype=torch.float32)
    for simd in cpu.simd_names():
        cpu.use_simd(simd)
        y, stats = cpu.forward(x, None, bias, None, estimator, eps=1e-5, relu=False)
        assert stats[0, 1] == x[0, 1].flatten()[0]
        assert estimator.kind == "mean" or not stats[1, 1:3].any()
        assert (y[:, 1] == 1).all()
        assert (y[:, 2] == 2).all()
        dx, *_ = cpu.backward(g, x, None, None, bias, stats, estimator, eps=1e-5, relu=False, has_residual=False)
        assert dx.isfinite().all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3, 4, 17, 19), (9, 40, 7, 7), (50, 33)], ids=["planes", "tiles", "rows"])
def test_nan_and_infinity_stay_in_their_channel(shape: tuple[int, ...], bad: float) -> None:
    x, g, residual = _example(shape, torch.float32, False)
    clean = x.clone()
    x[1, 2] = bad
    for simd, estimator, add in itertools.product(cpu.simd_names(), ESTIMATORS, [False, True]):
        cpu.use_simd(simd)
        options = {"eps": _eps(estimator), "relu": True}
        y, stats = cpu.forward(x, None, None, residual if add else None, estimator, **options)
        expected, _ = cpu.forward(clean, None, None, residual if add else None, estimator, **options)
        others = [channel for channel in range(shape[1]) if channel != 2]
        assert torch.equal(y[:, others], expected[:, others])
        assert torch.equal(stats[0, 2], x[:, 2].mean()) or (stats[0, 2].isnan() and x[:, 2].mean().isnan())
        if estimator.kind != "mean":
            assert y[:, 2].isnan().all()
        else:
            assert y[1, 2].isnan().all()
        dx, *_ = cpu.backward(g, x, y if add else None, None, None, stats, estimator, **options, has_residual=add)
        assert dx[:, others].isfinite().all()


def test_huge_values() -> None:
    x, *_ = _example((6, 5, 17, 17), torch.float32, False)
    x *= 1e25  # squares are beyond float32
    y, stats = cpu.forward(x, None, None, None, Estimator("l2"), eps=1e-5, relu=False)
    assert (stats[1] / x.double().std((0, 2, 3), correction=0) - 1).abs().max() < 1e-6
    assert y.std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_same_mask_in_both_passes(dtype: torch.dtype, last: bool) -> None:
    """Values that end next to 0: what ReLU passed on, and nothing else, has a gradient."""
    x, *_ = _example((8, 19, 17, 9), dtype, last)
    x[:] = x.mul(2).round().div(2)  # few values, of which each channel's bias moves one to 0
    ones = torch.ones_like(x)
    for simd, estimator in itertools.product(cpu.simd_names(), ESTIMATORS):
        cpu.use_simd(simd)
        options = {"eps": 1e-5, "relu": True}
        plain, stats = cpu.forward(x.float(), None, None, None, estimator, eps=1e-5, relu=False)
        bias = -plain[0, :, 0, 0].contiguous()
        weight = torch.linspace(0.3, 1.7, 19)
        y, stats = cpu.forward(x, weight, bias * weight, None, estimator, **options)
        _, _, dbias, _ = cpu.backward(
            ones, x, None, weight, bias * weight, stats, estimator, **options, has_residual=False
        )
        assert torch.equal(dbias, (y > 0).sum((0, 2, 3)).float())


@pytest.mark.parametrize("simd", ["avx512", "avx2", "baseline"])
def test_bfloat16_is_rounded_as_torch_rounds(simd: str) -> None:
    if simd not in cpu.simd_names():
        pytest.skip("not on this machine")
    cpu.use_simd(simd)
    x, _, residual = _example((9, 7, 6, 11), torch.bfloat16, False)
    y, _ = cpu.forward(x, None, None, residual, Estimator("l2"), eps=1e-5, relu=False)
    wide, _ = cpu.forward(x.float(), None, None, residual.float(), Estimator("l2"), eps=1e-5, relu=False)
    assert torch.equal(y, wide.bfloat16())
    x[0, 0, 0, 0] = float("nan")
    y, _ = cpu.forward(x, None, None, None, Estimator("mean"), eps=0.0, relu=True)
    assert y[:, 0].isnan().all()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("shape", [(64, 3, 29, 31), (40, 70, 7, 7), (40, 1000)], ids=["planes", "tiles", "rows"])
def test_threads(shape: tuple[int, ...], last: bool) -> None:
    x, g, residual = _example(shape, torch.float32, last and len(shape) == 4)
    before, results = torch.get_num_threads(), {}
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs = []
            for _ in range(2):
                y, stats = cpu.forward(x, None, None, residual, ESTIMATORS[1], eps=1e-5, relu=True)
                options = {"eps": 1e-5, "relu": True, "has_residual": True}
                runs.append([y, stats, *cpu.backward(g, x, y, None, None, stats, ESTIMATORS[1], **options)])
            assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
            results[threads] = runs[0]
    finally:
        torch.set_num_threads(before)
    for threads in (2, 3):
        for one, more in zip(results[1], results[threads], strict=True):
            torch.testing.assert_close(more, one, rtol=1e-5, atol=1e-5 * max(1.0, one.abs().max().item()))


THREADS = """
import os, torch
from norm_matters.norms.kernels import cpu
from norm_matters.norms.kernels.estimator import Estimator
x = torch.randn(32, 64, 32, 32)
torch.set_num_threads(2)
x.exp()
before = len(os.listdir("/proc/self/task"))
for layout in (torch.contiguous_format, torch.channels_last):
    cpu.forward(x.contiguous(memory_format=layout), None, None, None, Estimator("l1"), eps=1e-5, relu=False)
print(before, len(os.listdir("/proc/self/task")))
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no /proc")
def test_no_second_pool_of_threads() -> None:
    answer = subprocess.run([sys.executable, "-c", THREADS], capture_output=True, text=True, check=True)
    before, after = map(int, answer.stdout.split())
    assert before == after


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(3, 17, 17, 17), (5, 37, 7, 7), (3, 5, 3, 3)], ids=["planes", "tiles", "small"])
def test_nothing_else_is_written(
    shape: tuple[int, ...], dtype: torch.dtype, last: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    guarded, guard, empty_like = [], 64, torch.empty_like

    def with_guards(like: Tensor) -> Tensor:
        whole = torch.full((like.numel() + 2 * guard,), 77.0, dtype=like.dtype)
        guarded.append(whole)
        return whole[guard:-guard].as_strided(like.shape, like.stride(), guard)

    x, g, residual = _example(shape, dtype, last)
    for simd, estimator in itertools.product(cpu.simd_names(), ESTIMATORS):
        cpu.use_simd(simd)
        monkeypatch.setattr(torch, "empty_like", with_guards)
        y, stats = cpu.forward(x, None, None, residual, estimator, eps=1e-5, relu=True)
        cpu.backward(g, x, y, None, None, stats, estimator, eps=1e-5, relu=True, has_residual=True)
        monkeypatch.setattr(torch, "empty_like", empty_like)
    assert guarded
    for whole in guarded:
        assert (whole[:guard] == 77).all()
        assert (whole[-guard:] == 77).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "bfloat16"])
def test_streamed(dtype: torch.dtype) -> None:
    """A tensor beyond the last cache, whose output is written past it."""
    cache = os.sysconf("SC_LEVEL3_CACHE_SIZE") if "SC_LEVEL3_CACHE_SIZE" in os.sysconf_names else 0
    if cache > 256 * 2**20:
        pytest.skip("a tensor beyond this cache is large")
    side = math.isqrt((cache if cache > 0 else 32 * 2**20) // (32 * dtype.itemsize)) // 64 * 64 + 64
    x = torch.randn(2, 16, side, side, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert x.nbytes > cache
    for layout in (x, _last(x)):
        y, stats = cpu.forward(layout, None, None, None, Estimator("l2"), eps=1e-5, relu=False)
        wide = (layout.float() - stats[0].view(1, -1, 1, 1)) / (stats[1].view(1, -1, 1, 1) ** 2 + 1e-5).sqrt()
        tolerance = 1e-5 if dtype == torch.float32 else 2**-8
        torch.testing.assert_close(y.float(), wide, rtol=tolerance, atol=1e-5)


def test_unaligned() -> None:
    """One that no vector is aligned with."""
    flat, *_ = _example((1 + 3 * 5 * 400,), torch.float32, False)
    odd = flat[1:].view(3, 5, 20, 20)
    _check(odd, odd * 0.5, ESTIMATORS[1], relu=True, residual=None, weight=None, bias=None)


def test_reasons() -> None:
    x = torch.zeros(2, 3, 4, 4)
    assert cpu.reason_against(x, L2) is None
    assert "topk" in str(cpu.reason_against(x, Estimator("topk", k=2)))
    assert "float64" in str(cpu.reason_against(x.double(), L2))
    assert "meta" in str(cpu.reason_against(x.to("meta"), L2))
    assert "contiguous" in str(cpu.reason_against(x.transpose(0, 3), L2))
    assert "shape" in str(cpu.reason_against(x[:0], L2))
    with pytest.raises(UserError, match="avx9"):
        cpu.use_simd("avx9")


@pytest.mark.parametrize(("name", "found"), [("baseline", "baseline"), ("avx9", "None")])
def test_instructions_by_environment(name: str, found: str) -> None:
    program = (
        "import torch; from norm_matters.norms.kernels import cpu, estimator as e\n"
        "print(cpu.reason_against(torch.zeros(2, 3), e.Estimator('l1')) or cpu.current_simd())"
    )
    environment = {**os.environ, cpu.SIMD_VARIABLE: name}
    answer = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, env=environment
    )
    assert (found if found != "None" else "avx9: the C kernels have no such") in answer.stdout


def test_without_the_library(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(cpu, "__file__", str(tmp_path / "cpu.py"))
    cpu._library.cache_clear()
    try:
        assert "not built" in str(cpu.reason_against(torch.zeros(2, 3), L2))
        assert cpu.simd_names() == []
    finally:
        monkeypatch.undo()
        cpu._library.cache_clear()
