"""The statistics of a dataset as text and as CSV files."""

import csv
import io
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from norm_matters.core.cells import plain_cell
from norm_matters.packing.stats import DatasetStats, PartStats, shorter_sides
from norm_matters.record.files import make_folder, write_file

# Names that are shown of many.
SHOWN = 20
BAR = 40


def stats_lines(stats: DatasetStats) -> Iterator[str]:
    """The lines that say all of it to the eye."""
    yield f"{stats.name}: {len(stats.classes)} classes"
    for name, part in stats.parts.items():
        yield from _part_lines(name, part, stats.classes)
    copies = sum(len(names) - 1 for names in stats.duplicates)
    yield f"duplicates: {copies:,} images have the bytes of another; {stats.shared:,} to evaluate on are in train too"
    yield from _some([" = ".join(names) for names in stats.duplicates])


def _part_lines(name: str, part: PartStats, classes: Sequence[str]) -> Iterator[str]:
    counts = part.per_class
    yield f"{name}: {part.images:,} images, {part.bytes / 1e6:,.1f} MB"
    least, most = classes[counts.index(min(counts))], classes[counts.index(max(counts))]
    middle = statistics.median(counts)
    yield (
        f"  per class: {min(counts):,} ({least}) to {max(counts):,} ({most}), median {middle:g}, "
        f"imbalance {part.imbalance:.3g}"
    )
    if part.sizes:
        for title, numbers in (("mean", part.mean), ("std", part.std)):
            yield f"  {title:4} {', '.join(f'{number:.4f}' for number in numbers)}"
        widths, heights = zip(*part.sizes, strict=True)
        ranges = f"width {min(widths)} to {max(widths)}, height {min(heights)} to {max(heights)}"
        yield f"  {ranges}, {len(part.sizes):,} sizes"
        histogram = shorter_sides(part.sizes)
        highest = max(count for _, count in histogram)
        yield "  shorter side:"
        for side, count in histogram:
            yield f"    {side:>14} {count:>11,} {'#' * max(count > 0, round(BAR * count / highest))}"
    yield f"  broken: {len(part.broken):,}"
    yield from _some(part.broken)


def _some(lines: Sequence[str]) -> Iterator[str]:
    yield from (f"    {line}" for line in lines[:SHOWN])
    if len(lines) > SHOWN:
        yield f"    and {len(lines) - SHOWN:,} more (--json and --output have all)"


def write_stats(folder: Path, stats: DatasetStats) -> list[Path]:
    """Write classes.csv, sizes.csv, broken.csv and duplicates.csv; return their paths."""
    tables: dict[str, tuple[Sequence[str], list[Sequence[Any]]]] = {
        "classes.csv": (
            ("part", "label", "class", "images"),
            [
                (name, label, stats.classes[label], count)
                for name, part in stats.parts.items()
                for label, count in enumerate(part.per_class)
            ],
        ),
        "sizes.csv": (
            ("part", "width", "height", "images"),
            [(name, *size, count) for name, part in stats.parts.items() for size, count in sorted(part.sizes.items())],
        ),
        "broken.csv": (
            ("part", "problem"),
            [(name, problem) for name, part in stats.parts.items() for problem in part.broken],
        ),
        "duplicates.csv": (
            ("group", "image"),
            [(number, name) for number, names in enumerate(stats.duplicates) for name in names],
        ),
    }
    make_folder(folder)
    for name, (header, rows) in tables.items():
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows([map(plain_cell, row) for row in (header, *rows)])
        write_file(folder / name, text.getvalue().encode(errors="surrogateescape"))
    return [folder / name for name in tables]
