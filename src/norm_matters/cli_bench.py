"""The commands `bench ...`. Only typer is imported at the top: `--help` answers without torch."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from norm_matters.cli_options import AnyDevice, DataDir
from norm_matters.core.errors import UserError
from norm_matters.core.numbers import is_whole
from norm_matters.progress import printable, say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from norm_matters.bench import Measurement, NormRow

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
def about(
    context: typer.Context,
    check: Annotated[bool, typer.Option("--check", help="show what measurements depend on here, and end")] = False,
) -> None:
    """Measure norms on this machine."""
    if check:
        from norm_matters.bench import machine_facts

        for name, fact in machine_facts().items():
            say(f"{name:32}{fact}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        print(context.get_help())


@bench.command()
def norms(
    context: typer.Context,
    norms: Annotated[str | None, typer.Option(metavar="SPEC,...", help="batch norms; five by default")] = None,
    shapes: Annotated[str | None, typer.Option(metavar="NxCxHxW,...", help="six of ResNets by default")] = None,
    forms: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="of plain, relu and add_relu; all by default")
    ] = None,
    layouts: Annotated[
        str | None, typer.Option(metavar="NAME,...", help="of contiguous and channels_last; both by default")
    ] = None,
    dtypes: Annotated[str, typer.Option(metavar="NAME,...", help="of float32, bfloat16 and float16")] = "float32",
    repeats: Annotated[str | None, typer.Option(metavar="N", help="rounds; 9 by default")] = None,
    compiled: Annotated[
        bool, typer.Option("--compiled", help="time the compiled forms too, which takes minutes to compile")
    ] = False,
    device: AnyDevice = "cpu",
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="write norms.csv and norms.html there")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="two small shapes, 3 rounds, unless they are given")] = False,
) -> None:
    """Time norms, forward and backward, beside torch's own, in turns; and what they keep in memory."""
    if repeats is not None and not is_whole(repeats, 1):
        raise UserError(f"--repeats: value '{repeats}' is not valid; it takes a whole number from 1")
    from rich.console import Console
    from rich.progress import track

    from norm_matters.bench import copy_bandwidth, machine_facts, median_speedups, norm_cases, write_norms
    from norm_matters.bench.norms import FORMS, NORMS, QUICK_SHAPES, SHAPES
    from norm_matters.bench.timing import REPEATS
    from norm_matters.engine.device import resolve_device
    from norm_matters.record import collect_provenance

    place = str(resolve_device(device))
    cases = norm_cases(
        NORMS if norms is None else _split(norms),
        (QUICK_SHAPES if quick else SHAPES) if shapes is None else _split(shapes),
        forms=FORMS if forms is None else _split(forms),
        layouts=("contiguous", "channels_last") if layouts is None else _split(layouts),
        dtypes=_split(dtypes),
        device=place,
        compiled=compiled,
    )
    facts = machine_facts()
    bandwidth = copy_bandwidth(place)
    facts["bandwidth"] = f"{bandwidth / 1e9:.3g} GB/s, a copy's"
    rounds = int(repeats) if repeats else 3 if quick else REPEATS
    errors = Console(stderr=True)
    rows = [
        row
        for case in track(cases, "measuring", console=errors, transient=True, disable=not sys.stderr.isatty())
        for row in case.measure(bandwidth, repeats=rounds)
    ]
    Console(width=None if sys.stdout.isatty() else 200).print(_norms_table(rows))
    print(f"\na copy moves {bandwidth / 1e9:.3g} GB/s; times as fast as native, median over the shapes:")
    for where, group in median_speedups(rows).items():
        ratios = "  ".join(f"{norm} x{ratio:.2f}" for norm, ratio in group.items())
        say(f"  {', '.join(where):36}{ratios}")
    if output is not None:
        provenance = collect_provenance(context.obj, device=place, rounds=rounds, **facts)
        for path in write_norms(output, rows, provenance):
            say(f"written: {path}")


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
    device: AnyDevice = "cpu",
    output: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="write numerics.csv and numerics.html there")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help=f"{_QUICK_N} values per channel, unless --n is given")] = False,
) -> None:
    """Show in which number formats, and at which scale of its input, each norm breaks."""
    problems = []
    if rounding not in _ROUNDINGS:
        problems.append(f"--rounding: value '{rounding}' is not valid; it takes nearest or stochastic")
    if n is not None and not is_whole(n, 2):
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
            say(f"written: {path}")


@bench.command()
def train(
    context: typer.Context,
    model: Annotated[str, typer.Option(help="see `list models`; also timm:NAME, torchvision:NAME")] = "resnet20",
    norm: Annotated[str | None, typer.Option(help="of our side; see `list norms`")] = None,
    batch_size: Annotated[str, typer.Option(metavar="N")] = "128",
    image_size: Annotated[str, typer.Option(metavar="N", help="side of the noise that is trained on")] = "32",
    dataset: Annotated[str | None, typer.Option(help="train on this instead; see `list datasets`")] = None,
    data_dir: DataDir = None,
    end_to_end: Annotated[
        bool, typer.Option("--end-to-end", help="from images, cropped and flipped, not the same batch again")
    ] = False,
    against: Annotated[str, typer.Option(metavar="plain", help="what with: a plain torch loop")] = "plain",
    device: AnyDevice = "cpu",
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="write train.csv and train.html there")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 rounds, nothing compiled")] = False,
) -> None:
    """Time training by our engine, and by a plain torch loop in every form it has, in turns."""
    problems = [
        f"{option}: value '{value}' is not valid; it takes a whole number from {least}"
        for option, value, least in (("--batch-size", batch_size, 1), ("--image-size", image_size, 8))
        if not is_whole(value, least)
    ]
    if against != "plain":
        problems.append(f"--against: value '{against}' is not valid; it takes plain")
    if problems:
        raise UserError(*problems)
    from norm_matters.bench import (
        TrainCase,
        best_plain,
        default_arms,
        measure_train,
        train_page,
        write_page,
        write_train,
    )
    from norm_matters.bench.timing import REPEATS
    from norm_matters.engine.device import resolve_device
    from norm_matters.record import collect_provenance

    case = TrainCase(
        model=model,
        norm=norm,
        batch_size=int(batch_size),
        image_size=int(image_size),
        dataset=dataset,
        data_dir=data_dir,
        end_to_end=end_to_end,
        device=str(resolve_device(device)),
    )
    rows, notes = measure_train(case, default_arms(case, quick=quick), repeats=3 if quick else REPEATS)
    for row in rows:
        arm = f"{row.side:5}  {row.norm:14}  {row.layout:13}  {'compiled' if row.compiled else 'eager':8}"
        figures = f"{row.images_per_second:9,.0f} images/s  x{row.ours_is_faster_by:.2f}"
        say(f"{arm}  pages {row.pages:8}  workers {row.workers}  {figures}")
    best = best_plain(rows)
    print(
        f"ours is {best.ours_is_faster_by:.2f} times as fast as the best plain loop ({best.layout}, "
        f"{'compiled' if best.compiled else 'eager'}, pages {best.pages}, {best.workers} workers)"
    )
    for note in notes:
        say(f"left out: {note}")
    if output is not None:
        say(f"written: {write_train(output, rows)}")
        provenance = collect_provenance(context.obj, device=case.device)
        say(f"written: {write_page(output, 'train.html', train_page(rows, provenance))}")


@bench.command("input")
def input_speed(
    context: typer.Context,
    dataset: Annotated[
        str | None, typer.Option(help="small images, or imagefolder:DIR; noise and made-up photographs by default")
    ] = None,
    batch_size: Annotated[str, typer.Option(metavar="N")] = "128",
    workers: Annotated[
        str | None, typer.Option(metavar="N,...", help="to try; 0, 1 and as many as there are cores by default")
    ] = None,
    output: Annotated[Path | None, typer.Option(metavar="FOLDER", help="write input.csv and input.html there")] = None,
    quick: Annotated[bool, typer.Option("--quick", help="an eighth of the images, 3 rounds")] = False,
) -> None:
    """Time our loader, torchvision's transforms and timm's loader, in turns."""
    problems = []
    if not is_whole(batch_size, 1):
        problems.append(f"--batch-size: value '{batch_size}' is not valid; it takes a whole number from 1")
    numbers = [number.strip() for number in workers.split(",")] if workers is not None else []
    if not all(map(is_whole, numbers)):
        problems.append(f"--workers: value '{workers}' is not valid; it takes whole numbers from 0, such as 0,1,2")
    if problems:
        raise UserError(*problems)
    from norm_matters.bench import input_page, measure_input, write_input, write_page
    from norm_matters.bench.timing import REPEATS
    from norm_matters.record import collect_provenance

    rows = measure_input(
        dataset,
        batch_size=int(batch_size),
        workers=[int(number) for number in numbers],
        rounds=3 if quick else REPEATS,
        quick=quick,
    )
    print(f"{'task':8}{'library':14}{'workers':>7}{'images/s':>12}{'per core':>12}{'ours over this':>16}")
    for row in rows:
        speeds = f"{row.images_per_second:12,.0f}{row.per_core:12,.0f}{row.ours_over_this:16.2f}"
        print(f"{row.task:8}{row.library:14}{row.workers:7}{speeds}")
    if output is not None:
        say(f"written: {write_input(output, rows)}")
        provenance = collect_provenance(context.obj)
        say(f"written: {write_page(output, 'input.html', input_page(rows, provenance))}")


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


def _norms_table(rows: "Sequence[NormRow]") -> "Table":
    """A row for each implementation; a gap between cases."""
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("form", "layout", "dtype", "shape", "norm", "implementation"):
        table.add_column(heading, no_wrap=True)
    for heading in ("ms", "x native", "floor ms", "of floor", "kept MB", "peak MB"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("")
    last = None
    for row in rows:
        case = (row.form, row.layout, row.dtype, row.shape)
        if last not in (None, case):
            table.add_row()
        last = case
        numbers = (row.milliseconds, row.speedup, row.floor_ms, row.share_of_floor)
        sizes = (row.kept_bytes, row.peak_bytes)
        table.add_row(
            *case,
            row.norm,
            row.implementation,
            *("–" if number is None else f"{number:.3g}" for number in numbers),
            *("–" if size is None else f"{size / 1e6:.3g}" for size in sizes),
            Text(printable(row.error)),
        )
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
