"""The commands `data ...`. Only typer is imported at the top: `--help` answers without torch."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from norm_matters.cli_options import AsJson, DataDir, Number
from norm_matters.core.errors import UserError
from norm_matters.core.numbers import is_whole
from norm_matters.progress import say

Source = Annotated[str, typer.Argument(metavar="SRC", help="a folder of images or shards, or a dataset's name")]
Folder = Annotated[Path, typer.Argument(metavar="DST", help="a folder that `data pack` wrote")]
WorkersOption = Annotated[str, typer.Option(metavar="N", help="processes; auto takes every core")]

# Seconds between the lines that stand for a bar where nobody looks at one.
LINE_EVERY = 30

data = typer.Typer(invoke_without_command=True, rich_markup_mode=None)


@data.callback()
def about(context: typer.Context) -> None:
    """Pack images into shards, check them, and say what is in them."""
    if context.invoked_subcommand is None:
        print(context.get_help())


@data.command()
def pack(
    context: typer.Context,
    source: Source,
    target: Annotated[Path, typer.Argument(metavar="DST", help="a new folder, or one to go on with")],
    format: Annotated[str, typer.Option(metavar="webdataset|parquet")] = "webdataset",
    resize: Annotated[
        str | None, typer.Option(metavar="N", help="shrink shorter sides to N pixels, as JPEG; else bytes are copied")
    ] = None,
    quality: Annotated[str, typer.Option(metavar="N", help="of resized JPEGs, 1 to 100")] = "90",
    shard_size: Annotated[str, typer.Option(metavar="SIZE", help="of a shard, at most")] = "256MB",
    images_per_shard: Number = None,
    seed: Annotated[str, typer.Option(metavar="N", help="of the order of the training images")] = "0",
    bad_images: Annotated[
        str, typer.Option(metavar="refuse|skip|keep", help="that cannot be decoded; keep decodes none")
    ] = "refuse",
    workers: WorkersOption = "auto",
    data_dir: DataDir = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="say what would be written")] = False,
) -> None:
    """Write images as shards; run again after being cut off, it goes on where it stopped."""
    problems: list[str] = []
    numbers = {
        option: _number(option, value, problems)
        for option, value in (
            ("--resize", resize),
            ("--quality", quality),
            ("--images-per-shard", images_per_shard),
            ("--seed", seed),
        )
    }
    count = _workers(workers, problems)
    if problems:
        raise UserError(*problems)
    from norm_matters.packing import PackSettings, estimate_packing, open_source, pack_dataset, parse_bytes

    settings = PackSettings(
        format=format,  # pyright: ignore[reportArgumentType]
        resize=numbers["--resize"],
        quality=numbers["--quality"] or 0,
        shard_bytes=parse_bytes(shard_size),
        shard_images=numbers["--images-per-shard"],
        seed=numbers["--seed"] or 0,
        bad_images=bad_images,  # pyright: ignore[reportArgumentType]
    )
    found = open_source(source, data_dir=data_dir)
    total = sum(map(len, found.parts.values()))
    if dry_run:
        images = ", ".join(f"{len(part):,} {name}" for name, part in found.parts.items())
        shards, size = estimate_packing(found, settings)
        about = "at most " if settings.resize else "about "
        say(f"{found.name}: {images} images, {len(found.classes)} classes")
        say(f"{target}: {about}{shards} {settings.format} shards, {about}{size / 1e6:,.1f} MB; nothing is written")
        return
    with _progress("packing", total) as advance:
        packed = pack_dataset(found, target, settings, workers=count, command=context.obj, advance=advance)
    for problem in packed.skipped:
        say(f"skipped: {problem}", sys.stderr)
    images = ", ".join(f"{number:,} {name}" for name, number in packed.images.items())
    say(f"{packed.folder}: {images} images in {packed.shards} shards, {packed.bytes / 1e6:,.1f} MB, checked")
    name = f"{settings.format}:{packed.folder}"
    say(f"train on it with --dataset {name}")


@data.command()
def check(folder: Folder, workers: WorkersOption = "auto") -> None:
    """Compare shards with their manifest: sizes, hashes, counts."""
    problems: list[str] = []
    count = _workers(workers, problems)
    if problems:
        raise UserError(*problems)
    from norm_matters.datasets.manifest import read_manifest
    from norm_matters.packing import check_packed

    manifest = read_manifest(folder)
    total = sum(shard.images for shard in manifest.shards) if manifest else 0
    with _progress("checking", total) as advance:
        manifest = check_packed(folder, workers=count, advance=advance)
    say(f"{folder}: {total:,} images in {len(manifest.shards)} shards are as they were written")


@data.command()
def stats(
    source: Source,
    workers: WorkersOption = "auto",
    data_dir: DataDir = None,
    output: Annotated[Path | None, typer.Option(metavar="DIR", help="write CSV files there")] = None,
    as_json: AsJson = False,
) -> None:
    """Count images, sizes, broken files and duplicates, and take mean and deviation of the pixels."""
    problems: list[str] = []
    count = _workers(workers, problems)
    if problems:
        raise UserError(*problems)
    from norm_matters.packing import measure_dataset, open_source, stats_lines, write_stats

    found = open_source(source, data_dir=data_dir)
    with _progress("decoding", sum(map(len, found.parts.values()))) as advance:
        result = measure_dataset(found, workers=count, advance=advance)
    if as_json:
        print(json.dumps(result.to_json()))
    else:
        for line in stats_lines(result):
            say(line)
    for path in write_stats(output, result) if output else ():
        say(f"written: {path}", sys.stderr if as_json else sys.stdout)


def _number(option: str, value: str | None, problems: list[str]) -> int | None:
    if value is None:
        return None
    if not is_whole(value):
        problems.append(f"{option}: value '{value}' is not valid; it takes a whole number")
        return None
    return int(value)


def _workers(value: str, problems: list[str]) -> Any:
    if value == "auto" or (value.isdecimal() and len(value) < 5):
        return value if value == "auto" else int(value)
    problems.append(f"--workers: value '{value}' is not valid; it takes auto or a whole number from 0")
    return None


@contextmanager
def _progress(title: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time that is left, on a terminal; else a line every half minute."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    if sys.stderr.isatty():
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True), transient=True, speed_estimate_period=120) as bar:
            task = bar.add_task(title, total=total)
            yield lambda images: bar.advance(task, images)
        return
    import time

    start = last = time.monotonic()
    done = 0

    def advance(images: int) -> None:
        nonlocal done, last
        done += images
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            left = (now - start) / done * (total - done) if done else 0
            print(f"{title}: {done:,} of {total:,} images, {left / 60:.0f} minutes left", file=sys.stderr, flush=True)

    yield advance
