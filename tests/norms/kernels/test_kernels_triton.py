"""The Triton kernels in Triton's interpreter, against float64 and autograd on the definition; compiled for a GPU."""

import functools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from norm_matters.norms.kernels import triton as backend
from norm_matters.norms.kernels.estimator import Estimator

WORKER = Path(__file__).with_name("triton_worker.py")
KINDS = {"l2": ("l2", 0), "l1": ("l1", 0), "mean": ("mean", 0), "linf": ("topk", 1), "topk": ("topk", 3)}
FORMS = {"plain": (False, False), "relu": (False, True), "add": (True, False), "add-relu": (True, True)}
LAYOUTS = {"contiguous": False, "channels_last": True}
# What one process computes, and every test run looks at; the other cases are slow.
QUICK = {
    *(f"{kind}.relu.contiguous.float32" for kind in KINDS),
    *(f"{kind}.add-relu.channels_last.bfloat16" for kind in KINDS),
    *("topk.plain.channels_last.float32", "l1.relu.contiguous.float16"),
    *("shapes.l2.5x17.contiguous", "shapes.l1.2x3x3x2x2.channels_last", "shapes.topk.2x1x7x7.channels_last"),
    *("values.l2.degenerate.contiguous", "values.l1.degenerate.channels_last", "values.topk.degenerate.channels_last"),
    *("values.linf.degenerate.contiguous", "values.l2.far.contiguous"),
    *("ties.2.few.channels_last", "ties.7.few.contiguous", "ties.19.few.channels_last"),
}
GROUPS = (*KINDS, "shapes", "values", "ties")
# Half an ulp of the dtype, which the result is rounded to, and the arithmetic in float32.
TOLERANCE = {"float32": 2e-6, "float16": 2**-11 + 2e-6, "bfloat16": 2**-8 + 2e-6}


def work(*arguments: str, text: str = "", **environment: str) -> str:
    """The worker's output."""
    with tempfile.TemporaryDirectory() as cache:
        done = subprocess.run(
            [sys.executable, "-W", "error", str(WORKER), *arguments],
            input=text,
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "TRITON_CACHE_DIR": cache, "OMP_NUM_THREADS": "1", **environment},
        )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def case_of(
    shape: tuple[int, ...],
    name: str,
    *,
    k: int | None = None,
    form: str = "plain",
    layout: str = "contiguous",
    dtype: str = "float32",
    values: str = "random",
    affine: bool = True,
    eps: float = 1e-5,
) -> dict[str, Any]:
    """What is computed, without the numbers."""
    kind, of_kind = KINDS[name]
    residual, relu = FORMS[form]
    return {
        "shape": shape,
        "kind": kind,
        "constant": 1.25 if kind in ("l1", "topk") else 1.0,
        "k": of_kind if k is None else k,
        "residual": residual,
        "relu": relu,
        "channels_last": LAYOUTS[layout],
        "dtype": dtype,
        "values": values,
        "affine": affine,
        "eps": 0.0 if kind == "mean" else eps,
    }


def cases_of(group: str) -> dict[str, dict[str, Any]]:
    """The cases that one process computes, by name: a group's, or "quick" ones of all groups."""
    if group == "quick":
        cases = {f"{one}.{name}": case for one in GROUPS for name, case in all_cases_of(one).items()}
        return {name: cases[name] for name in sorted(QUICK)}
    return {f"{group}.{name}": case for name, case in all_cases_of(group).items() if f"{group}.{name}" not in QUICK}


def all_cases_of(group: str) -> dict[str, dict[str, Any]]:
    if group in KINDS:
        cases = {
            f"{form}.{layout}.float32": case_of((3, 2, 2, 9), group, form=form, layout=layout)
            for form in FORMS
            for layout in LAYOUTS
        }
        for dtype, form in [("bfloat16", "add-relu"), ("float16", "relu")]:
            for layout in LAYOUTS:
                cases[f"{form}.{layout}.{dtype}"] = case_of((3, 2, 2, 9), group, form=form, layout=layout, dtype=dtype)
        return cases
    if group == "shapes":
        shapes = [(2, 1), (5, 17), (2, 3, 1, 1), (2, 1, 7, 7), (3, 2, 49), (2, 3, 3, 2, 2)]
        return {
            f"{name}.{'x'.join(map(str, shape))}.{layout}": case_of(shape, name, layout=layout, affine=False)
            for name in ("l2", "l1", "topk")
            for shape in shapes
            for layout in (LAYOUTS if len(shape) > 3 else ["contiguous"])
        }
    if group == "values":
        return {
            f"{name}.{values}.{layout}": case_of((4, 4, 2, 5), name, values=values, layout=layout)
            for name in KINDS
            for values in ("degenerate", "far")
            for layout in LAYOUTS
        }
    assert group == "ties"
    ks = [1, 2, 7, 19, 20, 32]
    return {
        f"{k}.{values}.{layout}": case_of((4, 2, 1, 5), "topk", k=k, values=values, layout=layout)
        for k in ks
        for values in ("few", "random")
        for layout in LAYOUTS
    }


def tensors_of(name: str, case: dict[str, Any]) -> dict[str, Tensor]:
    """The numbers of a case in float32, each of which its dtype has."""
    generator = torch.Generator().manual_seed(sum(map(ord, name)))

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(getattr(torch, case["dtype"])).float()

    shape, channels = case["shape"], case["shape"][1]
    x = normal(*shape)
    if case["values"] == "few":
        x = (x * 2).round()  # mostly ties
    elif case["values"] == "far":
        x = x + 1000
    elif case["values"] == "degenerate":
        x[:, 0] = 0.1
        x[1, 1, 0, 2] = float("nan")
        x[2, 2, 1, 1] = float("inf")
    tensors = {"x": x, "grad": normal(*shape)}
    if case["residual"]:
        tensors["residual"] = normal(*shape)
    if case["affine"]:
        tensors |= {"weight": normal(channels), "bias": normal(channels)}
    return tensors


@functools.cache
def outcome_of(group: str) -> dict[str, Tensor] | AssertionError:
    """What the kernels make of a group, `case/result`; computed once, failed or not."""
    cases = cases_of(group)
    numbers = {f"{name}/{key}": value for name, case in cases.items() for key, value in tensors_of(name, case).items()}
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder, "cases"), Path(folder, "results")
        save_file(numbers, source, {"cases": json.dumps(cases)})
        try:
            work("run", str(source), str(target), TRITON_INTERPRET="1")
        except AssertionError as error:
            return error
        return load_file(target)


def over(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def expected(case: dict[str, Any], tensors: dict[str, Tensor], mean: Tensor) -> dict[str, Tensor]:
    """All results by the definition in float64, with gradients by autograd.

    Args:
        mean: (C,) of the kernel; it decides only which deviations tie, for that depends on how it is rounded.
    """
    leaves = {key: value.double().requires_grad_() for key, value in tensors.items()}
    x, channels = leaves["x"], case["shape"][1]
    dims = (0, *range(2, x.dim()))
    n = x.numel() // channels
    true_mean = x.mean(dims)
    d = x - over(true_mean, x)
    size, zero = d.abs(), torch.zeros(channels, dtype=torch.float64)
    rounded = (tensors["x"] - over(mean, x)).abs()
    stats = {"mean": true_mean, "sigma": zero + 1, "slope_sum": zero, "threshold": zero, "share": zero}
    if case["kind"] == "l2":
        variance = d.square().mean(dims)
        stats["sigma"] = torch.where(variance == 0, 0, torch.where(variance == 0, 1, variance).sqrt())
    elif case["kind"] == "l1":
        stats["sigma"] = case["constant"] * size.mean(dims)
        stats["slope_sum"] = (tensors["x"] - over(mean, x)).sign().double().nan_to_num(0).sum(dims)
    elif case["kind"] == "topk":
        k = min(case["k"], n)
        in_order = rounded.transpose(0, 1).flatten(1).sort(descending=True).values
        threshold = in_order[:, k - 1]
        above, ties = rounded > over(threshold, x), rounded == over(threshold, x)
        share = (k - above.sum(dims)) / ties.sum(dims).double()
        part = above + ties * over(share, x)
        stats["sigma"] = case["constant"] / k * (size * part).sum(dims)
        stats |= {"threshold": threshold.double(), "share": share, "slope_sum": (d.sign() * part).sum(dims)}
    y = d * over((stats["sigma"].square() + case["eps"]).rsqrt(), x)
    if case["affine"]:
        y = y * over(leaves["weight"], x) + over(leaves["bias"], x)
    y = y + leaves.get("residual", 0)
    y = y.relu() if case["relu"] else y
    names = list(leaves)
    names.remove("grad")
    gradients = torch.autograd.grad(y, [leaves[key] for key in names], leaves["grad"].detach())
    found = {"y": y.detach(), "stats": torch.stack(list(stats.values())).detach()}
    return found | {f"d{key}": gradient for key, gradient in zip(names, gradients, strict=True)}


def error_over_scale(result: Tensor, truth: Tensor, scale: Tensor) -> float:
    """The largest error against the scale of the numbers added up; NaN and infinity must be where they belong."""
    finite = truth.isfinite()
    assert torch.equal(result.isnan(), truth.isnan())
    assert torch.equal(result.double()[truth.isinf()], truth[truth.isinf()])
    errors = (result.double() - truth)[finite].abs() / scale.expand_as(truth)[finite]
    return errors.max().item() if errors.numel() else 0.0


def check(group: str, name: str) -> None:
    """Compare a case's results with the truth."""
    case, found = cases_of(group)[name], outcome_of(group)
    if isinstance(found, AssertionError):
        raise found
    tensors = tensors_of(name, case)
    result = {key: found[f"{name}/{key}"] for key in ("y", "again", "stats", "dx", "dweight", "dbias")}
    truth = expected(case, tensors, result["stats"][0])
    assert torch.equal(result["again"].nan_to_num(), result["y"].nan_to_num())
    assert result["y"].dtype == result["dx"].dtype == getattr(torch, case["dtype"])
    assert result["stats"].dtype == result["dweight"].dtype == torch.float32
    compare(case, tensors, result, truth)
    if f"{name}/dresidual" in found:
        assert torch.equal(found[f"{name}/dresidual"].double(), truth["dresidual"])


def compare(
    case: dict[str, Any], tensors: dict[str, Tensor], result: dict[str, Tensor], truth: dict[str, Tensor]
) -> None:
    """Every number against its scale."""
    sigma = truth["stats"][1].nan_to_num(1)
    dims = (0, *range(2, tensors["x"].dim()))
    size = tensors["x"].nan_to_num(0, 0, 0).abs().amax(dims).double()
    # d is exact to the rounding of x and of the mean, which sigma magnifies.
    blur = 1 + size / (sigma.square() + case["eps"]).sqrt()
    narrow, wide = TOLERANCE[case["dtype"]], TOLERANCE["float32"]
    weight = tensors.get("weight", torch.ones(1)).abs().double()
    r = (sigma.square() + case["eps"]).rsqrt()
    n = tensors["x"].numel() // len(size)
    x = tensors["x"]
    scales = {
        "y": over(blur * (1 + weight), x) * (1 + truth["y"].nan_to_num(0).abs()),
        "dx": over(blur.square() * (weight + 1e-3) * r, x) * 4,
        "dweight": blur * n,
        "dbias": torch.full_like(size, float(n)),
    }
    for row, key in enumerate(("mean", "sigma", "slope_sum", "threshold", "share")):
        real = truth["stats"][0].isfinite() | (torch.tensor(row < 2))
        close = error_over_scale(
            result["stats"][row][real], truth["stats"][row][real], (1 + size + n * (row == 2))[real]
        )
        assert close <= wide, f"{key}: {close}"
    for key, scale in scales.items():
        if key not in truth or (key in ("dweight", "dbias") and case["values"] == "degenerate" and case["relu"]):
            continue
        close = error_over_scale(result[key], truth[key], scale)
        assert close <= (narrow if key in ("y", "dx") else wide), f"{key}: {close}"


def names_of(*groups: str) -> list[Any]:
    return [pytest.param(group, name, id=name) for group in groups for name in cases_of(group)]


@pytest.mark.parametrize(("group", "name"), names_of("quick"))
def test_kernels_follow_the_definition(group: str, name: str) -> None:
    check(group, name)


@pytest.mark.slow
@pytest.mark.parametrize(("group", "name"), names_of(*GROUPS))
def test_every_form_layout_dtype_and_value(group: str, name: str) -> None:
    check(group, name)


def compiled(shape: tuple[int, ...], kinds: Iterable[str], form: str, layouts: Iterable[str], dtype: str) -> int:
    """How many kernels these need, all of which the compiler takes."""
    cases = [
        case_of(shape, kind, k=10 if kind == "topk" else None, form=form, layout=layout, dtype=dtype)
        for kind in kinds
        for layout in layouts
    ]
    return int(work("compile", text=json.dumps(cases)))


@pytest.mark.slow
def test_kernels_compile_for_a_gpu() -> None:
    """The interpreter lets through what the compiler refuses."""
    assert compiled((64, 64, 56, 56), ["l1"], "relu", ["contiguous"], "bfloat16") == 8


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "form", "dtype"),
    [
        ((64, 64, 56, 56), "add-relu", "float32"),
        ((256, 2048, 7, 7), "relu", "bfloat16"),
        ((5, 3, 7, 7), "add", "float16"),
    ],
    ids=["wide", "narrow", "odd"],
)
def test_all_kernels_compile_for_a_gpu(shape: tuple[int, ...], form: str, dtype: str) -> None:
    kinds = KINDS if form == "add-relu" else ["l2", "topk"]
    assert compiled(shape, kinds, form, LAYOUTS, dtype) >= 8 * len(kinds)


def test_it_says_what_speaks_against_it(monkeypatch: pytest.MonkeyPatch) -> None:
    l1, x = Estimator("l1"), torch.zeros(2, 3, 4, 5)
    assert backend.reason_against(x, l1) == "the input is on cpu, not on a GPU"
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert backend.reason_against(x, l1) is None
    assert backend.reason_against(x.contiguous(memory_format=torch.channels_last), l1) is None
    assert backend.reason_against(x[:, :, 0, 0].clone(), l1) is None
    assert backend.reason_against(x.double(), l1) == "float64 is not one of float32, float16 and bfloat16"
    strided = torch.zeros(4, 3, 4, 5)[::2]
    assert backend.reason_against(strided, l1) == "the input is neither contiguous nor in channels_last"
    assert backend.reason_against(x, Estimator("topk", 1.0, 32)) is None
    assert backend.reason_against(x, Estimator("topk", 1.0, 33)) == "k is more than 32"
    assert backend.reason_against(x[:0], l1) == "it takes from 1 to 2^30 values per channel"
    long = torch.zeros(1).expand(2, 1, 2**15, 2**15)
    assert backend.reason_against(long, l1) == "it takes from 1 to 2^30 values per channel"
    monkeypatch.setattr(backend, "_has_triton", lambda: False)
    assert backend.reason_against(x, l1) == "the package triton is not installed"


def test_importing_the_backend_does_not_import_triton() -> None:
    script = "import sys; import norm_matters.norms.kernels.triton; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


@given(
    shape=st.tuples(st.integers(1, 300), st.integers(1, 3000), st.integers(1, 120), st.integers(1, 120)),
    planes=st.booleans(),
    programs=st.integers(1, 2000),
)
@settings(deadline=None)
def test_the_parts_cover_the_tensor(shape: tuple[int, ...], planes: bool, programs: int) -> None:
    layout = backend._cut(shape, planes, programs, 4096)
    rows, units, channels, parts, tiles = layout.sizes
    block_rows, block_columns = layout.shape["BLOCK_ROWS"], layout.shape["BLOCK_COLUMNS"]
    columns = units * layout.shape["ALIGN"]
    assert rows * columns * (channels if planes else 1) == torch.Size(shape).numel()
    assert layout.values * channels == torch.Size(shape).numel()
    down, across = -(-rows // block_rows), -(-columns // block_columns)
    assert (tiles, layout.groups) == ((down * across, channels) if planes else (down, across))
    per_part = -(-tiles // parts)
    assert 0 < (parts - 1) * per_part < tiles <= parts * per_part or parts == 1
    assert per_part <= backend.TILES_PER_PART
    assert block_rows * block_columns <= 4096
    assert block_rows & (block_rows - 1) == block_columns & (block_columns - 1) == 0


def test_the_largest_tensors_stay_within_the_grid_of_a_device() -> None:
    for shape, planes in [((2**14, 1, 2**8, 2**8), True), ((2**14, 1, 2**8, 2**8), False), ((2**30, 2), False)]:
        layout = backend._cut(shape, planes, 1056, 4096)
        assert layout.parts <= 65535
        assert layout.sizes[4] <= layout.parts * -(-layout.sizes[4] // layout.parts)
