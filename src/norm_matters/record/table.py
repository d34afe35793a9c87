"""`results.csv`: one row per epoch, whole lines only, numbers that read back exactly. Imports no torch."""

import math
import re
from collections.abc import Iterable, Mapping
from numbers import Integral
from pathlib import Path

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.faults import fault_point
from norm_matters.core.reading import read_regular
from norm_matters.record.files import append_file, storing, write_file

LARGEST = 2**28
"""Bytes of the largest table that is read: a million epochs."""

TIMING_COLUMNS = ("seconds", "images_per_second", "val_seconds")
"""The columns that may differ between equal runs."""

COLUMNS = (
    "epoch",
    "step",
    "train_loss",
    "val_loss",
    "train_error1",
    "val_error1",
    "train_error5",
    "val_error5",
    "lr",
    "seconds",
    "images_per_second",
    "val_seconds",
    "loss_scale",
    "skipped_steps",
    "rejected_updates",
)


def append_row(path: Path, row: Mapping[str, float | None]) -> None:
    """Append one epoch to the table, with the header where the file is new.

    Args:
        path: the table.
        row: numbers by column (see `COLUMNS`); a column that is None or absent stays empty.

    Raises:
        StorageError: it could not be written; the table is as before.
    """
    assert set(row) <= set(COLUMNS), f"no such columns: {set(row) - set(COLUMNS)}"
    with storing(path):
        fault_point("table")
    append_file(path, _line(_text(row.get(column)) for column in COLUMNS), header=_line(COLUMNS))


def read_table(path: Path) -> list[dict[str, int | float | None]]:
    """Read a table, also one that is being written: a last line without its end is left out.

    Returns:
        One dict per row, in the order of the file; None for an empty cell. A missing file has no rows.

    Raises:
        UserError: a line that is no row of numbers; names the file and the line.
        StorageError: the file is there and cannot be read.
    """
    lines = _whole_lines(path)
    if not lines:
        return []
    header = _cells(lines[0])
    rows = []
    for number, line in enumerate(lines[1:], start=2):
        cells = _cells(line)
        if len(cells) != len(header):
            raise UserError(f"{path}, line {number}: {len(cells)} cells instead of {len(header)}")
        try:
            rows.append({column: _number(cell) for column, cell in zip(header, cells, strict=True)})
        except ValueError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
    return rows


def trim_table(path: Path, epochs: int) -> None:
    """Drop the rows after an epoch and a line cut short, so that a resumed run can append.

    Args:
        epochs: the last epoch to keep (that of the checkpoint); 0 drops all rows.

    Raises:
        UserError: the table is damaged, or its columns are not those of this version.
        StorageError: it could not be written; the table is as before.
    """
    rows = read_table(path)
    lines = _whole_lines(path)
    if lines and tuple(_cells(lines[0])) != COLUMNS:
        raise UserError(f"{path} has other columns than this norm-matters writes: a table never mixes two versions")
    kept = [line for line, row in zip(lines[1:], rows, strict=True) if (row["epoch"] or math.inf) <= epochs]
    data = b"".join([*lines[:1], *kept])
    if path.exists() and path.stat().st_size != len(data):
        write_file(path, data)


def _whole_lines(path: Path) -> list[bytes]:
    """The lines that have their end; nothing for a missing file."""
    try:
        data = read_regular(path, limit=LARGEST)
    except FileNotFoundError:
        return []
    except ValueError as error:
        raise UserError(f"{path} is no table: {error}") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    return [line for line in data.splitlines(keepends=True) if line.endswith(b"\n")]


def _line(cells: Iterable[str]) -> bytes:
    """Cells are numbers and our own column names: nothing ever needs a quote."""
    return (",".join(cells) + "\n").encode()


def _cells(line: bytes) -> list[str]:
    return line.decode(errors="replace").rstrip("\r\n").split(",")


def _text(value: float | None) -> str:
    """A number in the fewest digits that read back as the same number."""
    if value is None:
        return ""
    return str(int(value)) if isinstance(value, Integral) else repr(float(value))


def _number(cell: str) -> int | float | None:
    if not cell:
        return None
    if re.fullmatch(r"-?\d+", cell):
        return int(cell)
    try:
        return float(cell)
    except ValueError:
        raise ValueError(f"'{cell}' is no number") from None
