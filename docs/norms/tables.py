"""The tables of the cards, made from plots.csv and cost.csv: what stands from `<!-- table: ... -->` to `<!-- end -->`.

    <!-- table: rms topk -->            rms of the output by input, constant and n
    <!-- table: cost l1 none -->        passes, bytes kept and time of specs, beside nn.BatchNorm2d
    <!-- table: precision l1 -->        where sigma and the gradient are good, in each arithmetic
    <!-- table: mean -->                mean^ / mean, of the mean-only batch norm
    <!-- table: index -->               spread and passes of all

Needs no torch.
"""

import csv
import math
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

from norm_matters.record.files import write_file

HERE = Path(__file__).parent
NUMBERS = HERE / "plots.csv"
COSTS = HERE / "cost.csv"
NATIVE = "nn.BatchNorm2d"
_MARKED = re.compile(r"(<!-- table: (?P<what>[^>]*?) -->\n).*?(<!-- end -->)", re.DOTALL)
# How far sigma, or the gradient, may be off to be called good.
TOLERANCE = 0.1
# n of the tables.
_COUNTS = (64, 1024, 16384)
_ARITHMETICS = (
    *(f"{form}, {accumulator}" for form in ("fp16", "bf16", "e4m3") for accumulator in ("fp32", "sequential")),
    "float16 input",
    "float16 input, stats_dtype=input",
)


class Series(NamedTuple):
    """The points of a series, x in rising order."""

    x: list[float]
    y: list[float]

    def at(self, x: float) -> float:
        """The value at x."""
        return self.y[self.x.index(x)]


@cache
def read_numbers(path: Path = NUMBERS) -> dict[tuple[str, str, str], Series]:
    """plots.csv by (norm, panel, series)."""
    found: dict[tuple[str, str, str], Series] = {}
    with open(path, newline="") as file:
        for row in csv.DictReader(file):
            series = found.setdefault((row["norm"], row["panel"], row["series"]), Series([], []))
            series.x.append(float(row["x"]))
            series.y.append(float(row["y"]))
    return found


@cache
def read_costs(path: Path = COSTS) -> dict[str, dict[str, str]]:
    """cost.csv by spec."""
    with open(path, newline="") as file:
        return {row["spec"]: row for row in csv.DictReader(file)}


def fill(text: str) -> str:
    """Replace every marked table of a page by what the numbers say now.

    Raises:
        KeyError: a table asks for numbers that there are not.
    """
    return _MARKED.sub(lambda found: found[1] + _table(*found["what"].split(" ")) + found[3], text)


def fill_pages(folder: Path = HERE) -> list[Path]:
    """Fill the tables of all pages of a folder; returns those that changed."""
    changed = []
    for page in sorted(folder.glob("*.md")):
        text = page.read_text()
        if (filled := fill(text)) != text:
            write_file(page, filled)
            changed.append(page)
    return changed


def _table(kind: str, *keys: str) -> str:
    rows = {"rms": _rms, "cost": _cost, "precision": _precision, "mean": _mean, "index": _index}[kind](keys)
    head, *body = rows
    lines = [head, ["---"] * len(head), *body]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _rms(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    (name,) = keys
    numbers = read_numbers()
    kinds = [kind for kind in ("calibrated", "paper", "no constant") if (name, "rms", f"Gaussian, {kind}") in numbers]
    yield ["input", *(f"{kind}, n = {n:,}" for kind in kinds for n in _COUNTS)]
    for source in ("Gaussian", "uniform", "Laplace", "ReLU'd Gaussian"):
        series = [numbers[name, "rms", f"{source}, {kind}"] for kind in kinds]
        yield [source, *(f"{line.at(n):.3f}" for line in series for n in _COUNTS)]


def _cost(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    yield ["", "forward: reads", "writes", "backward: reads", "writes", "kept", "time"]
    for spec in (*keys, NATIVE):
        row = read_costs()[spec]
        counts = ("forward_reads", "forward_writes", "backward_reads", "backward_writes", "kept")
        yield [f"`{spec}`", *(f"{float(row[key]):.1f}" for key in counts), _time(row)]


def _time(row: dict[str, str]) -> str:
    median, low, high = (float(row[key]) for key in ("time", "time_low", "time_high"))
    return f"{median:.1f} ({low:.1f} to {high:.1f})" if median else "0"


def _precision(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    several = [""] if len(keys) > 1 else []
    yield [*several, "arithmetic", "σ̂/σ at σ = 1", "σ̂ good for σ", "gradient good for σ"]
    for name in keys:
        for arithmetic in _ARITHMETICS:
            ratio, error = (read_numbers().get((name, panel, arithmetic)) for panel in ("sigma", "gradient"))
            if ratio is None or error is None:
                continue
            good = [abs(value - 1) <= TOLERANCE for value in ratio.y]
            steep = [value <= TOLERANCE for value in error.y]
            names = [f"`{name}`"] if several else []
            yield [*names, arithmetic, _number(ratio.at(1)), _range(ratio.x, good), _range(error.x, steep)]


def _mean(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    yield ["arithmetic", "mean at mean = 1", "good for mean"]
    for arithmetic in _ARITHMETICS[:6]:
        series = read_numbers()["mean", "mean", arithmetic]
        good = [abs(value - 1) <= TOLERANCE for value in series.y]
        yield [arithmetic, _number(series.at(1)), _range(series.x, good)]


def _index(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    specs = {"topk": "topk:k=10", "lp": "lp:p=3"}
    spreads = {specs.get(name, name): line for (name, panel, _), line in read_numbers().items() if panel == "spread"}
    yield ["spec", "spread of σ̂: n = 1,024", "n = 16,384", "reads + writes: forward", "backward", "kept", "time"]
    for spec, row in read_costs().items():
        spread = spreads.get(spec)
        passes = [
            f"{float(row[f'{way}_reads']):.1f} + {float(row[f'{way}_writes']):.1f}" for way in ("forward", "backward")
        ]
        shown = [""] * 2 if spread is None else [f"{spread.at(n):.2%}" for n in (1024, 16384)]
        yield [f"`{spec}`", *shown, *passes, f"{float(row['kept']):.1f}", _time(row)]


def _number(value: float) -> str:
    return "∞" if math.isinf(value) else f"{value:.2f}"


def _range(x: Sequence[float], good: Sequence[bool]) -> str:
    """The longest run of x where it is good: `2^-9 to 2^4`."""
    best = start = 0, 0
    for i, holds in enumerate(good):
        start = (start[0], i + 1) if holds else (i + 1, i + 1)
        best = max(best, start, key=lambda run: run[1] - run[0])
    first, end = best
    if first == end:
        return "none"
    if end - first == len(x):
        return "all"
    ends = [f"2^{round(math.log2(x[i]))}" for i in (first, end - 1)]
    return f"{ends[0]} to {ends[1]}" if ends[0] != ends[1] else f"{ends[0]} only"
