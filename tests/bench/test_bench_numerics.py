"""`bench numerics`: what it measures, what it calls broken, and what it prints and writes."""

import csv
import math
from pathlib import Path

import pytest
import torch

from norm_matters.bench.numerics import SIGMAS, Case, Measurement, judge, numerics_cases
from norm_matters.bench.numerics_page import COLOURS, numerics_page, ratio_text, write_numerics
from norm_matters.cli import main
from norm_matters.cli_bench import _split
from norm_matters.core.errors import UserError

PAPER_N = 131_072


def measure(norm: str, form: str, accumulator: str, n: int = PAPER_N, sigmas: tuple[float, ...] = (1.0,), **options):
    case = Case(norm, form, accumulator, options.pop("rounding", "nearest"), n, sigmas)
    return case.measure(**options)


@pytest.mark.parametrize(("norm", "expected"), [("l1", 0.08), ("l2", 0.43)])
def test_sequential_float16_sums_stall_as_the_paper_notes_say(norm, expected):
    """`shared/paper.md`: n = 131,072, sigma = 1. (Over draws, L2 varies from 0.42 to 0.43.)"""
    (row,) = measure(norm, "fp16", "sequential")
    assert round(row.ratio, 2) == expected
    assert row.verdict == "biased"
    # By numpy's float16, without any of our arithmetic.
    import numpy as np

    z = torch.randn(PAPER_N, generator=torch.Generator().manual_seed(0)).numpy()
    terms = (np.abs(z) if norm == "l1" else z * z).astype(np.float16)
    total = float(np.add.accumulate(terms)[-1]) / PAPER_N
    assert row.ratio == pytest.approx(math.sqrt(math.pi / 2) * total if norm == "l1" else math.sqrt(total), rel=0.01)


@pytest.mark.parametrize("norm", ["l1", "l2"])
def test_pairwise_float16_sums_overflow(norm):
    (row,) = measure(norm, "fp16", "pairwise")
    assert (row.ratio, row.output_error, row.verdict) == (math.inf, 1.0, "overflow")


def test_float32_accumulator_with_float16_terms():
    """L1 works from 0.01 to 1000; L2's output is 0 from 100 on, where squares exceed float16."""
    sigmas = (1e-2, 1e-1, 1.0, 1e1, 1e2, 1e3)
    assert [row.verdict for row in measure("l1", "fp16", "fp32", sigmas=sigmas)] == ["ok"] * 6
    assert [row.verdict for row in measure("l2", "fp16", "fp32", sigmas=sigmas)] == ["ok"] * 4 + ["overflow"] * 2


@pytest.mark.parametrize("norm", ["l2", "l1", "linf", "topk:k=10", "lp:p=3", "range", "rms"])
@pytest.mark.parametrize("accumulator", ["fp32", "pairwise", "sequential"])
def test_float32_breaks_nowhere(norm, accumulator):
    for row in measure(norm, "fp32", accumulator, n=2000, sigmas=SIGMAS):
        assert row.verdict == "ok"
        assert row.ratio == pytest.approx(1, abs=1e-5)
        assert max(row.output_error, row.gradient_error) < 1e-4


def test_stochastic_rounding_is_measured():
    """A sum of 4,096 values stalls in e5m2 rounded to nearest; it does not on average."""
    torch.manual_seed(0)
    (row,) = measure("l1", "e5m2", "sequential", n=4096, rounding="stochastic")
    assert measure("l1", "e5m2", "sequential", n=4096)[0].ratio < 0.05
    assert 0.5 < row.ratio < 2
    assert row.rounding == "stochastic"


def test_errors_are_relative_to_float64():
    """A norm that finds half of sigma puts out twice the values, with gradients to match."""
    (row,) = measure("l1", "e8m2", "fp32", n=4096, sigmas=(1.0,))
    x, g = (t.double() for t in _draws(4096))
    x = x.requires_grad_()
    y = (x - x.mean()) / (((x - x.mean()).abs().mean() * math.sqrt(math.pi / 2)) ** 2 + 1e-5).sqrt()
    (expected,) = torch.autograd.grad(y, x, g)
    from norm_matters.norms import create_norm

    leaf = x.detach().float()[:, None].requires_grad_()
    got = create_norm("l1:stats_format=e8m2", 1)(leaf)
    got.backward(g.float()[:, None])
    output_error = (got[:, 0] - y).detach().norm() / y.detach().norm()
    gradient_error = (leaf.grad[:, 0] - expected).norm() / expected.norm()
    assert row.output_error == pytest.approx(float(output_error), rel=1e-3)
    assert row.gradient_error == pytest.approx(float(gradient_error), rel=1e-3)
    assert row.output_error > 1e-3


def _draws(n: int) -> tuple[torch.Tensor, ...]:
    draw = torch.Generator().manual_seed(0)
    return tuple(torch.randn(n, generator=draw) for _ in range(2))


@pytest.mark.parametrize(
    ("numbers", "verdict"),
    [
        ((1.01, 0.01, 0.02), "ok"),
        ((0.0, 0.01, 0.02), "ok"),
        ((0.4, 0.6, 0.7), "biased"),
        ((0.0, 0.6, 0.7), "underflow"),
        ((1.0, 0.01, 0.06), "wrong gradient"),
        ((1.0, 0.01, math.nan), "no gradient"),
        ((0.4, 0.6, math.inf), "no gradient"),
        ((math.inf, 1.0, math.nan), "overflow"),
        ((math.inf, math.nan, math.nan), "nan"),
        ((math.nan, math.nan, math.nan), "nan"),
    ],
)
def test_verdicts(numbers, verdict):
    assert judge(*numbers) == verdict


def test_cases_are_all_combinations_in_order():
    cases = numerics_cases(["l1", "topk"], ["e5m10", "bf16"], accumulators=["sequential", "fp32"], n=64, sigmas=(1.0,))
    assert [(case.norm, case.format, case.accumulator) for case in cases] == [
        (norm, form, accumulator)
        for norm in ("l1", "topk:k=10")
        for form in ("fp16", "bf16")
        for accumulator in ("fp32", "sequential")
    ]
    assert len(numerics_cases()) == 5 * 5 * 3
    assert numerics_cases(["l1", "l1"], ["fp16", "e5m10"]) == numerics_cases(["l1"], ["fp16"])


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        numerics_cases(["l1:momentum=0.5", "mean", "layer", "l3"], ["fp17", "bf16"], accumulators=["pair"], n=1)
    told = "\n".join(caught.value.problems)
    for part in (
        "'l1:momentum=0.5': momentum cannot be given here",
        "'mean' has no sigma of its own",
        "'layer' has no sigma of its own",
        "unknown norm 'l3'",
        "'fp17' is unknown; did you mean 'fp16'",
        "'pair' is unknown; did you mean 'pairwise'",
        "--n: value '1'",
    ):
        assert part in told
    assert len(caught.value.problems) == 7


def test_lists_of_specs():
    assert _split("l1,topk:k=3,constant=paper,lp:p=3") == ["l1", "topk:k=3,constant=paper", "lp:p=3"]
    assert _split("ghost:size=4,base=(topk:k=1,constant=paper), l2") == [
        "ghost:size=4,base=(topk:k=1,constant=paper)",
        "l2",
    ]


@pytest.mark.parametrize(
    ("ratio", "text"),
    [
        (0.4293, "0.43"),
        (1.0, "1.00"),
        (0.0, "0"),
        (6.24e-5, "6e-05"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (1e4, "1e+04"),
    ],
)
def test_ratio_text(ratio, text):
    assert ratio_text(ratio) == text
    assert len(text) <= 5


def read(table: Path) -> list[dict[str, str]]:
    with table.open() as file:
        return list(csv.DictReader(file))


def some_rows() -> list[Measurement]:
    numbers = {"ok": 1.0, "biased": 0.43, "overflow": math.inf, "nan": math.nan}
    return [
        Measurement("l1", form, accumulator, "nearest", 64, 10.0**power, ratio, 0.5, math.nan, verdict)
        for form in ("fp16", "e4m3")
        for accumulator in ("fp32", "pairwise")
        for power, (verdict, ratio) in enumerate(numbers.items())
    ]


def test_files(tmp_path):
    rows = some_rows()
    table, page = write_numerics(tmp_path / "new", rows)
    written = read(table)
    assert list(written[0]) == list(Measurement._fields)
    assert [row["verdict"] for row in written] == [row.verdict for row in rows]
    assert [float(row["ratio"]) for row in written[:3]] == [1.0, 0.43, math.inf]
    text = page.read_text()
    assert "Accumulator: pairwise" in text
    assert all(COLOURS[row.verdict] in text for row in rows)
    # The page's own policy forbids requests; and there is nothing in it to ask for one.
    assert "default-src &#x27;none&#x27;" in text
    assert "<script src" not in text
    # Written anew, in one go, where there is one.
    write_numerics(tmp_path / "new", rows[:4])
    assert len(table.read_text().splitlines()) == 5


def test_page_shows_every_verdict():
    text = numerics_page(some_rows()).decode()
    for verdict in COLOURS:
        assert f"{verdict}: " in text
    assert "64 standard normal values per channel" in text


def test_command(tmp_path, capsys):
    folder = tmp_path / "out"
    arguments = ["bench", "numerics", "--norms", "l1,l2", "--formats", "fp16", "--n", "512", "--output", str(folder)]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    lines = shown.splitlines()
    assert lines[0].split() == ["norm", "format", "accumulator", *(f"{sigma:g}" for sigma in SIGMAS)]
    rows = [line.split() for line in lines if line.startswith(("l1", "l2"))]
    assert [row[:3] for row in rows] == [
        [norm, "fp16", accumulator] for norm in ("l1", "l2") for accumulator in ("fp32", "pairwise", "sequential")
    ]
    # L2 in float16, where 1e-8 is no number, and 1e5 is none.
    assert [rows[3][3], *rows[3][5:]] == ["0", "1.00", "1.00", "1.00", "1.00", "inf", "inf"]
    assert f"written: {folder / 'numerics.csv'}" in shown
    assert (folder / "numerics.html").exists()


def test_quick_and_stochastic(tmp_path, capsys):
    arguments = ["bench", "numerics", "--quick", "--norms", "linf", "--formats", "e5m2", "--accumulators", "pairwise"]
    torch.manual_seed(0)
    assert main([*arguments, "--rounding", "stochastic", "--output", str(tmp_path)]) == 0
    rows = read(tmp_path / "numerics.csv")
    assert {(row["n"], row["rounding"], row["accumulator"]) for row in rows} == {("4096", "stochastic", "pairwise")}
    assert len(rows) == len(SIGMAS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--n", "1"], "--n: value '1' is not valid"),
        (["--n", "many"], "--n: value 'many' is not valid"),
        (["--rounding", "up"], "--rounding: value 'up' is not valid"),
        (["--norms", "l7"], "unknown norm 'l7'"),
        (["--formats", "fp17"], "number format 'fp17' is unknown"),
        (["--device", "cuda:99"], "'cuda:99' is not to be had here"),
    ],
)
def test_wrong_arguments(arguments, message, capsys):
    assert main(["bench", "numerics", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_bench_alone_shows_its_help(capsys):
    assert main(["bench"]) == 0
    assert "numerics" in capsys.readouterr().out


def test_recorded_table_is_the_measured_one():
    """results/numerics.csv, at the cells that docs/numerics.md speaks of."""
    table = Path(__file__).parents[2] / "results" / "numerics.csv"
    recorded = {(r["norm"], r["format"], r["accumulator"], float(r["sigma"])): r for r in read(table)}
    for norm in ("l1", "l2"):
        for accumulator in ("fp32", "sequential", "pairwise"):
            (row,) = measure(norm, "fp16", accumulator)
            cell = recorded[norm, "fp16", accumulator, 1.0]
            assert cell["verdict"] == row.verdict
            assert float(cell["ratio"]) == pytest.approx(row.ratio, rel=1e-3)
