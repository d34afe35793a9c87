"""Simulated number formats against torch's and numpy's own, and norms that reduce in them."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from norm_matters.core.errors import UserError
from norm_matters.norms import NORMS, create_norm, spec_of
from norm_matters.norms.arithmetic import Arithmetic
from norm_matters.norms.formats import NumberFormat, parse_format

# The formats that torch has, with an integer of the same size.
CASTS = {
    "fp16": (torch.float16, torch.int16),
    "bf16": (torch.bfloat16, torch.int16),
    "e5m2": (torch.float8_e5m2, torch.int8),
    "e4m3": (torch.float8_e4m3fn, torch.int8),
}
TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
OTHERS = ["e2m1", "e2m3", "e3m2", "e3m4", "e4m2", "e6m5", "e8m1", "e7m6", "tf32", "e5m11", "e2m23", "e8m22"]


def every_number(form: NumberFormat) -> np.ndarray:
    """All finite numbers from 0 of a format of up to 16 bits, rising, straight from the definition of IEEE 754."""
    bias = 2 ** (form.exponent_bits - 1) - 1
    m = form.mantissa_bits
    numbers = []
    for exponent in range(2**form.exponent_bits):
        for fraction in range(2**m):
            if exponent == 2**form.exponent_bits - 1 and (form.infinity or fraction == 2**m - 1):
                continue
            lead = 1 if exponent else 0
            numbers.append((lead + fraction / 2**m) * 2.0 ** (max(exponent, 1) - bias))
    return np.array(numbers)


def round_by_search(x: np.ndarray, form: NumberFormat) -> np.ndarray:
    """To the nearest of all numbers; on a tie the one at an even place, which has an even mantissa."""
    numbers = every_number(form)
    # The number that would follow the largest: what is rounded to it has overflowed.
    numbers = np.append(numbers, 2 * numbers[-1] - numbers[-2])
    size = np.minimum(np.nan_to_num(np.abs(x), nan=0.0, posinf=np.inf), numbers[-1])
    above = np.searchsorted(numbers, size).clip(1)
    below = above - 1
    gap_above, gap_below = numbers[above] - size, size - numbers[below]
    up = (gap_above < gap_below) | ((gap_above == gap_below) & (above % 2 == 0))
    place = np.where(up, above, below)
    beyond = np.inf if form.infinity else form.largest
    rounded = np.where(place == len(numbers) - 1, beyond, numbers[place])
    return np.copysign(np.where(np.isnan(x), np.nan, rounded), x)


def around(numbers: torch.Tensor) -> torch.Tensor:
    """The numbers (rising, float32), the middles between them, and the float32 neighbours of all these; both signs."""
    middles = (numbers[:-1].double() / 2 + numbers[1:].double() / 2).float()
    beyond = torch.tensor([1.5, 2.0]) * numbers[-1]
    points = torch.cat([numbers, middles, beyond])
    points = torch.cat([points, *(points.nextafter(torch.tensor(end)) for end in (-torch.inf, torch.inf))])
    return torch.cat([points, -points, torch.tensor([torch.inf, -torch.inf, torch.nan])])


def assert_same_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    assert torch.equal(actual.isnan(), expected.isnan())
    integer = torch.int64 if actual.dtype == torch.float64 else torch.int32
    same = (actual.view(integer) == expected.view(integer)) | actual.isnan()
    assert same.all(), f"{actual[~same][:5]} is not {expected[~same][:5]}"


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """By torch; its cast to e4m3 saturates from 2.12 on, and gives NaN before."""
    if dtype == torch.float8_e4m3fn and TORCH < (2, 12):
        x = x.clamp(-448, 448)
    return x.to(dtype).float()


@pytest.mark.parametrize("name", CASTS)
def test_rounding_is_torchs_cast_around_every_number(name):
    dtype, integer = CASTS[name]
    limits = torch.iinfo(integer)
    codes = torch.arange(limits.min, limits.max + 1).to(integer)
    numbers = codes.view(dtype).float()
    numbers = numbers[numbers.isfinite() & (numbers >= 0)].unique()
    x = around(numbers)
    assert_same_bits(parse_format(name).round(x), cast(x, dtype))
    # What is a number of the format stays.
    assert_same_bits(parse_format(name).round(codes.view(dtype).float()), codes.view(dtype).float())


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(width=32), min_size=1, max_size=20))
def test_rounding_is_torchs_cast(values):
    x = torch.tensor(values, dtype=torch.float32)
    for name, (dtype, _) in CASTS.items():
        assert_same_bits(parse_format(name).round(x), cast(x, dtype))
    assert_same_bits(parse_format("fp32").round(x), x)


def test_rounding_any_bits_of_float32_is_torchs_cast():
    """Three million patterns: every exponent, subnormal numbers and NaN among them."""
    bits = torch.randint(-(2**31), 2**31, (3_000_000,), generator=torch.Generator().manual_seed(0))
    x = bits.to(torch.int32).view(torch.float32)
    for name, (dtype, _) in CASTS.items():
        assert_same_bits(parse_format(name).round(x), cast(x, dtype))


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(), min_size=1, max_size=20))
def test_float64_is_rounded_once(values):
    """numpy rounds float64 to float16 in one step, and torch to float32; by way of float32 ties would be wrong."""
    x = torch.tensor(values, dtype=torch.float64)
    assert_same_bits(parse_format("fp32").round(x), x.float().double())
    with np.errstate(over="ignore"):
        half = torch.from_numpy(x.numpy().astype(np.float16)).double()
    assert_same_bits(parse_format("fp16").round(x), half)


def test_a_tie_that_float32_would_make():
    x = torch.tensor([1 + 2.0**-11 + 2.0**-40], dtype=torch.float64)
    assert parse_format("fp16").round(x) == 1 + 2.0**-10
    assert parse_format("fp16").round(x.float()) == 1


@pytest.mark.parametrize("name", ["e4m3", "e5m2", *OTHERS[:8]])
def test_any_format_against_all_its_numbers(name):
    form = parse_format(name)
    numbers = every_number(form)
    assert form.largest == numbers[-1]
    assert form.smallest_normal == numbers[2**form.mantissa_bits]
    x = around(torch.from_numpy(numbers).float())
    expected = torch.from_numpy(round_by_search(x.double().numpy(), form))
    assert_same_bits(form.round(x), expected.float())
    assert_same_bits(form.round(x.double()), expected)


@pytest.mark.parametrize("name", OTHERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounded_numbers_have_the_bits_of_the_format(name, dtype):
    """In units of the spacing they are integers that nothing changes, no further off than half."""
    form = parse_format(name)
    x = torch.randn(5000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    x = x * 2.0 ** torch.linspace(-130, 100, 5000, dtype=dtype)
    rounded = form.round(x)
    inside = x.abs() <= form.largest
    assert_same_bits(form.round(rounded), rounded)
    _, exponent = torch.frexp(x.double())
    spacing = 2.0 ** (torch.where(x == 0, -1074, exponent) - 1 - form.mantissa_bits).double()
    spacing = spacing.clamp(min=form.smallest_normal * 2.0**-form.mantissa_bits)
    units = rounded.double() / spacing
    assert torch.equal(units[inside], units[inside].round())
    assert ((rounded.double() - x.double()).abs() <= spacing / 2)[inside].all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_widened(dtype):
    x = torch.randn(100, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert_same_bits(parse_format("e4m3").round(x), x.float().to(torch.float8_e4m3fn).float())
    assert_same_bits(parse_format("fp16").round(x), x.to(torch.float16).float())
    assert_same_bits(parse_format("bf16").round(x), x.to(torch.bfloat16).float())


@pytest.mark.parametrize(
    ("text", "canonical"),
    [("e5m10", "fp16"), ("e8m7", "bf16"), ("e8m23", "fp32"), ("e8m10", "tf32"), ("e4m3", "e4m3"), ("e5m2", "e5m2")],
)
def test_names_of_formats(text, canonical):
    assert str(parse_format(text)) == canonical
    assert parse_format(canonical) == parse_format(text)
    assert create_norm(f"l1:stats_format={text}", 2).spec == f"l1:stats_format={canonical}"


@pytest.mark.parametrize("text", ["fp8", "e1m3", "e9m3", "e4m0", "e4m24", "E4M3", "e4m3fn", "", "e04m3", "e4m03"])
def test_unknown_format(text):
    with pytest.raises(UserError, match=f"number format '{text}' is unknown"):
        parse_format(text)


def test_unknown_format_names_the_nearest():
    with pytest.raises(UserError, match="norm 'l1': stats_format=fp61: number format 'fp61' is unknown; did you mean"):
        create_norm("l1", 2, stats_format="fp61")


# Stochastic rounding


@pytest.mark.parametrize("name", ["fp16", "bf16", "e4m3", "e5m2", "e8m22"])
def test_stochastic_rounding_takes_the_neighbours_by_their_distance(name):
    form = parse_format(name)
    subnormal = form.smallest_normal * 2.0**-form.mantissa_bits
    points = torch.tensor([1.1, 0.3, 1 + 2.0 ** -(form.mantissa_bits + 2), 0.2 * subnormal, 2.75 * subnormal, 1.0, 0.0])
    points = torch.cat([points, -points])
    draws = 20_000
    x = points.expand(draws, -1)
    rounded = form.round(x, "stochastic", torch.Generator().manual_seed(0)).double()
    below = form.round(points, "nearest").double()
    spacing = torch.maximum(2.0 ** points.double().abs().log2().floor(), torch.tensor(form.smallest_normal))
    spacing = spacing * 2.0**-form.mantissa_bits
    below = (points.double() / spacing).floor() * spacing
    assert ((rounded == below) | (rounded == below + spacing)).all()
    share = (points.double() - below) / spacing
    deviation = (share * (1 - share) / draws).sqrt()
    error = ((rounded - below) / spacing).mean(0) - share
    assert (error.abs() <= 5 * deviation).all(), error / deviation
    # Numbers of the format are never moved; a zero keeps its sign.
    assert torch.equal(rounded[:, [5, 6, 12, 13]].float(), x[:, [5, 6, 12, 13]])
    assert torch.equal(rounded.signbit(), x.signbit())


def test_stochastic_rounding_by_the_seed():
    x = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    form = parse_format("e4m3")
    torch.manual_seed(3)
    first, second = form.round(x, "stochastic"), form.round(x, "stochastic")
    torch.manual_seed(3)
    assert torch.equal(form.round(x, "stochastic"), first)
    assert not torch.equal(first, second)


@pytest.mark.parametrize(("name", "top"), [("e5m2", torch.inf), ("e4m3", 448.0)])
def test_stochastic_rounding_beyond_the_largest(name, top):
    """A quarter of the way to the number that would come next: a quarter of the draws goes there."""
    form = parse_format(name)
    step = 2.0**-form.mantissa_bits * form.highest_power
    x = torch.full((10_000,), form.largest + step / 4)
    rounded = form.round(x, "stochastic", torch.Generator().manual_seed(0))
    assert ((rounded == form.largest) | (rounded == top)).all()
    if form.infinity:
        assert (rounded == top).float().mean() == pytest.approx(0.25, abs=0.025)
    far = form.round(torch.tensor([4 * form.largest, torch.inf, -torch.inf, torch.nan]), "stochastic")
    torch.testing.assert_close(far, torch.tensor([top, top, -top, torch.nan]), equal_nan=True)


# Accumulators


def arithmetic(stats: str, accumulate: str, rounding: str = "nearest", sums: str | None = None) -> Arithmetic:
    form = parse_format(stats)
    return Arithmetic(form, accumulate, rounding, parse_format(sums) if sums else form)


def naive_sequential(terms: np.ndarray, add) -> np.ndarray:
    """Add rows (n, C) by `add(a, b)` one after the other."""
    total = np.zeros_like(terms[0])
    for row in terms:
        total = add(total, row)
    return total


def naive_pairwise(terms: np.ndarray, add) -> np.ndarray:
    """Add neighbours, then neighbouring sums; an odd one waits."""
    while len(terms) > 1:
        terms = np.stack([add(*terms[i : i + 2]) if i + 1 < len(terms) else terms[i] for i in range(0, len(terms), 2)])
    return terms[0]


NAIVE = {"sequential": naive_sequential, "pairwise": naive_pairwise}


def channels(n: int, seed: int = 0) -> torch.Tensor:
    """Values (n, 5): sums that stall, cancel, overflow float16, stay below its normal numbers, and meet a NaN."""
    z = torch.randn(n, 5, generator=torch.Generator().manual_seed(seed))
    x = torch.stack([z[:, 0].abs(), z[:, 1], 300 * z[:, 2].abs(), 1e-6 * z[:, 3], z[:, 4]], 1)
    x[n // 2, 4] = torch.nan
    return x


@pytest.mark.parametrize("accumulate", NAIVE)
@pytest.mark.parametrize("n", [1, 2, 7, 64, 1001])
def test_float16_sums_are_numpys(accumulate, n):
    x = channels(n)
    with np.errstate(over="ignore", invalid="ignore"):
        expected = NAIVE[accumulate](x.numpy().astype(np.float16), lambda a, b: np.float16(1) * (a + b))
    total = arithmetic("fp16", accumulate).sum(x)
    assert_same_bits(total, torch.from_numpy(expected).float())
    if n == 1001:
        assert total[2] == torch.inf
        assert total[4].isnan()


@pytest.mark.parametrize("accumulate", NAIVE)
def test_bfloat16_sums_are_torchs(accumulate):
    x = channels(700)

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (torch.from_numpy(a).bfloat16() + torch.from_numpy(b).bfloat16()).float().numpy()

    expected = NAIVE[accumulate](x.bfloat16().float().numpy(), add)
    assert_same_bits(arithmetic("bf16", accumulate).sum(x), torch.from_numpy(expected))


@pytest.mark.parametrize("accumulate", NAIVE)
def test_float32_sums_are_numpys(accumulate):
    x = channels(700)
    expected = NAIVE[accumulate](x.numpy(), lambda a, b: a + b)
    assert_same_bits(arithmetic("fp32", accumulate).sum(x), torch.from_numpy(expected))


@pytest.mark.parametrize("accumulate", NAIVE)
@pytest.mark.parametrize("name", ["e4m3", "e5m2", "e2m1", "e3m4", "e6m5", "e8m1"])
def test_sums_in_any_format_of_few_bits(name, accumulate):
    """Float64 holds the sum of two of their numbers exactly (e8m1: rounded once is rounded twice alike)."""
    form = parse_format(name)
    x = channels(200) * min(form.largest / 1000, 1)

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        with np.errstate(invalid="ignore"):
            return round_by_search(a + b, form)

    expected = NAIVE[accumulate](round_by_search(x.double().numpy(), form), add)
    assert_same_bits(arithmetic(name, accumulate).sum(x), torch.from_numpy(expected).float())


@pytest.mark.parametrize("accumulate", NAIVE)
@pytest.mark.parametrize("name", ["tf32", "e5m11", "e8m22", "e5m23"])
def test_sums_in_wider_formats(name, accumulate):
    """Of which float32 would round the sums a second time."""
    form = parse_format(name)
    x = channels(400)

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return form.round(torch.from_numpy(a + b)).numpy()

    expected = NAIVE[accumulate](form.round(x.double()).numpy(), add)
    assert_same_bits(arithmetic(name, accumulate).sum(x), torch.from_numpy(expected).float())


def test_sums_that_overflow():
    """Infinity stays, and with its opposite leaves NaN; e4m3, without infinity, goes on from its largest number."""
    x = torch.tensor([[240.0, 2.0], [240.0, 2.0], [-240.0, 2.0], [-240.0, 2.0]])
    assert_same_bits(arithmetic("e4m3", "sequential").sum(x), torch.tensor([448.0 - 480.0, 8.0]))
    assert_same_bits(arithmetic("e4m3", "pairwise").sum(x), torch.tensor([0.0, 8.0]))
    assert_same_bits(arithmetic("e4m3", "sequential").sum(1e9 * x[:2]), torch.tensor([448.0, 448.0]))
    wide = torch.tensor([[57344.0], [57344.0], [-57344.0], [-57344.0]])
    assert arithmetic("e5m2", "sequential").sum(wide) == torch.inf
    assert arithmetic("e5m2", "pairwise").sum(wide).isnan()
    assert arithmetic("e5m2", "fp32").sum(wide) == 0


@pytest.mark.parametrize("accumulate", ["fp32", *NAIVE])
def test_float32_accumulator_rounds_the_terms_only(accumulate):
    x = torch.full((1000, 1), 1.0 + 2.0**-9)
    total = arithmetic("bf16", accumulate).sum(x)
    assert total == {"fp32": 1000, "pairwise": 1000, "sequential": 256}[accumulate]


def test_accumulator_in_a_format_of_its_own():
    x = torch.full((3000, 1), 1.0 + 2.0**-9)
    assert arithmetic("bf16", "sequential", sums="fp16").sum(x) == 2048
    assert arithmetic("fp32", "sequential", sums="bf16").sum(x) == 256
    assert arithmetic("bf16", "sequential", sums="fp32").sum(x) == 3000
    # A term enters in the format of the accumulator.
    assert arithmetic("bf16", "sequential", sums="fp16").sum(torch.tensor([[1e5], [1.0]])) == torch.inf
    # 0.13 is 0.125 there, which makes a tie with 1; as it is it would make 1.25.
    for accumulate in NAIVE:
        assert arithmetic("fp32", accumulate, sums="e5m2").sum(torch.tensor([[1.0], [0.13]])) == 1


@pytest.mark.parametrize("accumulate", ["fp32", *NAIVE])
@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (2, 3, 4, 5)])
def test_order_of_the_terms(accumulate, shape):
    """Images one after the other, in each its positions; whatever the layout and the strides."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * 100
    rows = x.transpose(0, 1).flatten(1).t()
    expected = arithmetic("e5m2", accumulate).sum(rows.contiguous())
    assert torch.equal(arithmetic("e5m2", accumulate).sum(x), expected)
    if x.dim() == 4:
        assert torch.equal(arithmetic("e5m2", accumulate).sum(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(arithmetic("e5m2", accumulate).sum(x.repeat_interleave(2, -1)[..., ::2]), expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("accumulate", ["fp32", *NAIVE])
def test_dtype_of_sums(accumulate, dtype):
    total = arithmetic("fp16", accumulate).sum(torch.ones(3, 2, 2, dtype=dtype))
    assert total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert total.tolist() == [6, 6]


@pytest.mark.parametrize("accumulate", NAIVE)
@pytest.mark.parametrize(("name", "term"), [("fp16", 0.7), ("bf16", 0.37), ("e4m3", 0.3), ("fp16", 3e-4)])
def test_stochastic_sums_are_right_on_average(accumulate, name, term):
    """Where sums rounded to nearest stall; also for terms below the resolution that float32 has at the sum."""
    n, repeats = (3000 if term < 1e-3 else 300), 1000
    form = parse_format(name)
    start = 32768.0 if term < 1e-3 else 0.0
    x = torch.full((n, repeats), float(form.round(torch.tensor(term))))
    x[0] = start
    torch.manual_seed(0)
    total = arithmetic(name, accumulate, "stochastic").sum(x).double()
    expected = x[:, 0].double().sum()
    assert torch.equal(form.round(total), total)
    error = total.mean() - expected
    deviation = total.std() / repeats**0.5
    assert abs(error) <= 4 * deviation
    assert deviation > 0
    if accumulate == "sequential":
        # What the average has to be told from.
        stalled = arithmetic(name, accumulate).sum(x[:, :1]).double()
        assert abs(stalled - expected) > 5 * deviation


# Norms

SIMULATED = [name for name in NORMS.names() if "stats_format" in NORMS.get(name).OPTIONS]
STATISTICS = ["l2", "l1", "linf", "topk:k=4", "lp:p=3", "rms", "range", "mean"]


def step(spec: str, x: torch.Tensor, **options: object) -> list[torch.Tensor]:
    """Output and all gradients of a new norm in training."""
    norm = create_norm(spec, x.shape[1], dtype=x.dtype, **options)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(5)
    y = norm(leaf)
    y.backward(torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype))
    return [y.detach(), leaf.grad, *(parameter.grad for parameter in norm.parameters() if parameter.requires_grad)]


def batch(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (2 * torch.randn(shape, generator=torch.Generator().manual_seed(0)) + 0.5).to(dtype)


@pytest.mark.parametrize("spec", [*SIMULATED, "topk:k=4", "layer:statistic=l1", "group:groups=2,statistic=topk:k=3"])
@pytest.mark.parametrize("accumulate", ["fp32", "pairwise", "sequential"])
def test_simulated_float32_is_the_plain_norm(spec, accumulate):
    x = batch(16, 8, 5, 4)
    plain = step(spec, x)
    simulated = step(spec, x, stats_format="fp32", accumulator=accumulate)
    for expected, actual in zip(plain, simulated, strict=True):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("accumulate", "rounding"),
    [("fp32", "nearest"), ("pairwise", "nearest"), ("sequential", "nearest"), ("sequential", "stochastic")],
)
@pytest.mark.parametrize("spec", SIMULATED)
def test_every_norm_computes_in_a_coarse_format(spec, accumulate, rounding):
    """Coarse numbers make another result, of the same meaning; the seed decides over stochastic rounding."""
    x = batch(8, 8, 4, 4)
    options = {"stats_format": "e6m6", "accumulator": accumulate, "rounding": rounding}
    plain, coarse = step(spec, x), step(spec, x, **options)
    if spec != "frozen":  # which takes no statistics
        assert not torch.equal(plain[1], coarse[1])
    for expected, actual in zip(plain, coarse, strict=True):
        assert actual.isfinite().all()
        # (What noisy draws depends on how many draws there were before.)
        assert (actual - expected).norm() < 0.3 * expected.norm() or (spec, rounding) == ("noisy", "stochastic")
    again = step(spec, x, **options)
    assert all(torch.equal(a, b) for a, b in zip(coarse, again, strict=True))


@pytest.mark.parametrize("spec", STATISTICS)
@pytest.mark.parametrize("name", ["bf16", "e4m3", "e5m2"])
def test_mean_and_sigma_are_numbers_of_the_format(spec, name):
    norm = create_norm(spec, 8, stats_format=name)
    _, mean, var = norm.normalise_batch(batch(16, 8, 3))
    form = parse_format(name)
    assert torch.equal(form.round(mean), mean)
    sigma = (var * (47 / 48) if spec == "l2" else var).sqrt()
    torch.testing.assert_close(form.round(sigma), sigma, rtol=1e-6, atol=0)


def seq16(terms: np.ndarray) -> np.float64:
    """The terms (n,) rounded to float16 and added in it one after the other."""
    total = np.float16(0)
    for term in terms.astype(np.float16):
        total = np.float16(total + term)
    return np.float64(total)


def half(value: np.float64) -> np.float64:
    return np.float64(np.float16(value))


@pytest.mark.parametrize("spec", ["l1", "l2", "topk:k=40", "lp:p=3"])
def test_norm_in_sequential_float16_by_the_formulas(spec):
    """Forward and backward of one channel, each sum taken by a loop over numpy's float16."""
    n = 6000
    x = batch(n, 1).double().numpy()[:, 0]
    g = np.cos(np.linspace(-1, 2, n)).astype(np.float32).astype(np.float64) + 0.25
    norm = create_norm(spec, 1, stats_format="fp16", accumulator="sequential")
    torch.nn.init.constant_(norm.weight, 1.5)

    mean = half(seq16(x) / n)
    d = (x - mean).astype(np.float32).astype(np.float64)
    size = np.abs(d)
    if spec == "l1":
        slope = np.sign(d)
        gain = math.sqrt(math.pi / 2) / n
        sigma = half(gain * seq16(size))
    elif spec == "l2":
        slope = d
        root = math.sqrt(half(seq16(d**2) / n))
        sigma, gain = half(root), 1 / (n * root)
    elif spec == "lp:p=3":
        largest = half(size.max())
        moment = seq16((size / largest) ** 3) / n
        constant = norm.calibrated_constant(n)
        sigma = half(constant * largest * moment ** (1 / 3))
        slope = (size / largest) ** 2 * np.sign(d)
        gain = constant / n * moment ** (1 / 3 - 1)
    else:
        gain = norm.calibrated_constant(n) / 40
        sigma = half(gain * seq16(np.sort(size)[::-1][:40]))
        slope = np.where(size >= np.sort(size)[-40], np.sign(d), 0)
    r = 1 / math.sqrt(sigma**2 + 1e-5)
    dweight, dbias = seq16(g * d) * r, seq16(g)
    dx = 1.5 * r * (g - dbias / n) - r**2 * sigma * 1.5 * dweight * gain * (slope - seq16(slope) / n)

    leaf = torch.from_numpy(x).float()[:, None].requires_grad_()
    y, got_mean, var = norm.normalise_batch(leaf)
    y.backward(torch.from_numpy(g).float()[:, None])
    assert got_mean == mean
    var = var * (n - 1) / n if spec == "l2" else var
    assert float(var.sqrt()) == pytest.approx(sigma, rel=1e-6)
    np.testing.assert_allclose(y.detach().numpy()[:, 0], 1.5 * d * r, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(norm.weight.grad, dweight, rtol=1e-5)
    np.testing.assert_allclose(norm.bias.grad, dbias, rtol=1e-6)
    np.testing.assert_allclose(leaf.grad.numpy()[:, 0], dx, rtol=1e-4, atol=1e-5)
    # Not what exact sums give.
    exact = create_norm(spec, 1)
    torch.nn.init.constant_(exact.weight, 1.5)
    assert abs(float(exact.normalise_batch(leaf)[2].sqrt()) - sigma) > 1e-4
    assert abs(dbias - g.sum()) > 1


def test_maxima_are_rounded_where_they_enter_and_chosen_before():
    """Two values that round alike differ in the gradient: the larger one gets it all."""
    x = torch.zeros(64, 1)
    x[3], x[5] = 1.001, 1.0011
    x = (x - x.mean()).requires_grad_()
    for spec in ("linf", "range"):
        norm = create_norm(spec, 1, stats_format="bf16", affine=False)
        y, _, var = norm.normalise_batch(x)
        (gradient,) = torch.autograd.grad(y[9:].sum(), x)
        plain = create_norm(spec, 1, affine=False).normalise_batch(x)
        (expected,) = torch.autograd.grad(plain[0][9:].sum(), x)
        torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.02)
        assert var != plain[2]


@pytest.mark.parametrize("spec", ["lp:p=3", "range"])
def test_largest_deviation_is_rounded(spec):
    """It is beyond float16 here, though the values and sigma are not."""
    x = torch.full((1000, 1), -30000.0)
    x[3] = 60000.0
    _, mean, var = create_norm(spec, 1, stats_format="fp16").normalise_batch(x)
    assert mean.isfinite()
    assert not var.isfinite()
    assert create_norm(spec, 1).normalise_batch(x)[2].sqrt() < 65504


@pytest.mark.parametrize("spec", ["l2", "rms"])
def test_variance_is_rounded(spec):
    """1e-9 is 0 in float16, though the one square that it is made of, 1e-6, and sigma, 3e-5, are not."""
    x = torch.zeros(1000, 1)
    x[3] = 1e-3
    assert create_norm(spec, 1, stats_format="fp16").normalise_batch(x)[2] == 0
    assert create_norm(spec, 1, stats_format="bf16").normalise_batch(x)[2] > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("spec", STATISTICS)
def test_simulation_of_other_inputs(spec, dtype):
    x = batch(8, 4, 3, dtype=dtype)
    got = step(spec, x, stats_format="e6m9", accumulator="pairwise")
    plain = step(spec, x)
    for expected, actual in zip(plain, got, strict=True):
        assert actual.dtype == expected.dtype
        torch.testing.assert_close(actual, expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("l1:accumulator_format=fp16", "accumulator_format=fp16 needs accumulator=pairwise or sequential"),
        ("layer:rounding=stochastic", "rounding=stochastic needs a format to round to"),
        ("l1:accumulator=sorted", "accumulator=sorted must be fp32 or pairwise or sequential"),
        ("l1:stats_format=fp16,accumulator=pairwise,accumulator_format=fp33", "did you mean 'fp32'"),
    ],
)
def test_options_that_make_no_sense(spec, message):
    with pytest.raises(UserError, match=message):
        create_norm(spec, 4)


def test_options_read_back():
    spec = "topk:k=3,stats_format=e5m2,accumulator=sequential,accumulator_format=bf16,rounding=stochastic"
    norm = create_norm(spec, 4)
    assert norm.spec == spec
    assert spec_of(norm) == spec
    reducer = norm.reducer()
    assert str(reducer.arithmetic.format) == "e5m2"
    assert str(reducer.arithmetic.accumulator_format) == "bf16"
    # An accumulator alone: float32 terms, float32 sums in that order.
    assert str(create_norm("l1:accumulator=sequential", 4).reducer().arithmetic.accumulator_format) == "fp32"
    assert create_norm("l1", 4).reducer().plain


@pytest.mark.parametrize("sigma", [1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3])
@pytest.mark.parametrize("spec", ["l1", "l2"])
def test_float16_input_with_float32_statistics(spec, sigma):
    """Finite gradients, and the right ones, for every sigma at which float16 holds the input."""
    draw = torch.Generator().manual_seed(0)
    x, g = ((torch.randn(32, 2, 64, 64, generator=draw) * scale).half() for scale in (sigma, 1))
    results = []
    for dtype in (torch.float16, torch.float64):
        norm = create_norm(spec, 2, dtype=dtype)
        leaf = x.detach().to(dtype, copy=True).requires_grad_()
        y = norm(leaf)
        y.backward(g.to(dtype))
        results.append((y.double(), leaf.grad.double(), norm.weight.grad.double(), norm.bias.grad.double()))
    for actual, expected in zip(*results, strict=True):
        assert actual.isfinite().all()
        assert (actual - expected).norm() <= 2e-3 * expected.norm()
