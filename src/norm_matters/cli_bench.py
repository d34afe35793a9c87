"""The commands `bench ...`. Only typer is imported at the top: `--help` answers without torch."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from norm_matters.core.errors import UserError
from norm_matters.progress import printable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from norm_matters.bench import Measurement

_ROUNDINGS = ("nearest", "stochastic")
_QUICK_N = 4096
_FULL_N = 131_072

# Verdict -> what is put after the number, and its style.
_MARKS = {
    "ok": (" ", "green"),
    "wrong gradient": ("!", "yellow"),
    "biased": ("~", "yellow"),
    "underflow": ("~", "cyan"),
    "no gradient": ("!", "red"),
    "overflow": (" ", "red"),
    "nan": (" ", "red"),
}
_KEY = """
Under each sigma of the input: the norm's estimate of it over the one in float64.
~ the output is off by more than 5%; ! the gradient is, or is not finite; inf: the output is 0; nan: it is not finite"""

bench = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@bench.callback()
def about(context: typer.Context) -> None:
    """Measure norms on this machine."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
def numerics(
    norms: Annotated[str | None, typer.Option(metavar="SPEC,...", help="batch norms; five of the paper's")] = None,
    formats: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="fp32, fp16, bf16, tf32, e4m3, any eXmY; five by default")
    ] = None,
    accumulators: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="of fp32, pairwise and sequential; all by default")
    ] = None,
    n: Annotated[str | None, typer.Option("--n", metavar="N", help=f"values per channel; {_FULL_N} by default")] = None,
    rounding: Annotated[str, typer.Option(metavar="|".join(_ROUNDINGS))] = "nearest",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps")] = "cpu",
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write numerics.csv and numerics.html there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{_QUICK_N} values per channel, unless --n is given")] = False,
) -> None:
    """Show in which number formats, and at which scale of its input, each norm breaks."""
    problems = []
    if rounding not in _ROUNDINGS:
        problems.append(f"--rounding: value '{rounding}' is not valid; it takes nearest or stochastic")
    if n is not None and not (n.isdecimal() and int(n) > 1):
        problems.append(f"--n: value '{n}' is not valid; it takes a whole number from 2")
    if problems:
        raise UserError(*problems)
    from rich.console import Console
    from rich.progress import track

    from norm_matters.bench import write_numerics
    from norm_matters.bench.numerics import ACCUMULATORS, FORMATS, NORMS, numerics_cases
    from norm_matters.engine.device import resolve_device

    cases = numerics_cases(
        NORMS if norms is None else _split(norms),
        FORMATS if formats is None else _split(formats),
        accumulators=ACCUMULATORS if accumulators is None else _split(accumulators),
        n=int(n) if n else _QUICK_N if quick else _FULL_N,
        rounding=cast(Literal["nearest", "stochastic"], rounding),
        device=str(resolve_device(device)),
    )
    errors = Console(stderr=True)
    measurements = [
        measurement
        for case in track(cases, "measuring", console=errors, transient=True, disable=not sys.stderr.isatty())
        for measurement in case.measure()
    ]
    # Nothing is cut off where no one looks at the width.
    console = Console(width=None if sys.stdout.isatty() else 200)
    console.print(_table(measurements))
    console.print(_KEY, highlight=False)
    if output is not None:
        for path in write_numerics(output, measurements):
            print(printable(f"written: {path}"))


def _table(measurements: "Sequence[Measurement]") -> "Table":
    """A row for each norm, format and accumulator, a column for each sigma."""
    from rich.table import Table

    from norm_matters.bench import ratio_text

    sigmas = list(dict.fromkeys(row.sigma for row in measurements))
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("norm", "format", "accumulator"):
        table.add_column(heading, no_wrap=True)
    for sigma in sigmas:
        table.add_column(f"{sigma:g}", justify="right", no_wrap=True)
    last = ""
    for start in range(0, len(measurements), len(sigmas)):
        rows = measurements[start : start + len(sigmas)]
        cells = []
        for row in rows:
            mark, style = _MARKS[row.verdict]
            cells.append(f"[{style}]{ratio_text(row.ratio)}{mark}[/]")
        if last not in ("", rows[0].norm):
            table.add_row()
        last = rows[0].norm
        table.add_row(rows[0].norm, rows[0].format, rows[0].accumulator, *cells)
    return table


def _split(text: str) -> list[str]:
    """The names in a list; the options of a spec have commas too, and so have specs in parentheses."""
    names: list[str] = []
    for part in re.split(r",(?![^()]*\))", text):
        if names and "=" in part and ":" not in part.partition("=")[0]:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return [name.strip() for name in names]
