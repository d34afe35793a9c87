"""`instruments.f32`: what the instruments measured, one row of float32 numbers per epoch. Imports no torch.

Beside it `instruments.json` says what each number of a row is. A row is its epoch and then the values of each column,
all of them little-endian float32; every row of a run has the same length. A row cut short by a kill is dropped when
the run is resumed.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.json import parse_json
from norm_matters.core.reading import read_regular
from norm_matters.record.files import append_file, write_file

LAYOUT_FILE = "instruments.json"
VALUES_FILE = "instruments.f32"
FORMAT = 1
LARGEST = 2**32
"""Bytes of the largest file of measurements that is read."""

_FLOAT = np.dtype("<f4")

Columns = Sequence[tuple[str, str, int]]
"""(instrument, layer, number of values) of each piece of a row, in order."""


@dataclass(frozen=True)
class Measurements:
    """What the instruments of a run measured.

    Attributes:
        epochs: (rows,) the epochs, counting up.
        columns: instrument -> layer -> (rows, values) float32, in the order of the file; NaN where there is no value.
    """

    epochs: np.ndarray
    columns: dict[str, dict[str, np.ndarray]]


def write_layout(run: Path, columns: Columns) -> None:
    """Say what the rows to come hold; nothing to do where the same is said already.

    Raises:
        UserError: the rows that are there already hold something else.
        StorageError: it could not be written.
    """
    path = run / LAYOUT_FILE
    text = _layout_text(columns)
    if path.exists() and (run / VALUES_FILE).exists() and _size(run / VALUES_FILE):
        if [tuple(column) for column in columns] != _read_layout(path):
            raise UserError(f"{path} is not the layout of this run: a file never mixes two; {_REMEDY}")
        return
    write_file(path, text)


def append_measurements(run: Path, epoch: int, values: np.ndarray) -> None:
    """Append one epoch.

    Args:
        values: one number after the other, in the order of the columns that `write_layout` was given.

    Raises:
        StorageError: it could not be written; the file is as before.
    """
    with np.errstate(over="ignore"):  # what float32 cannot hold is infinite there
        row = np.concatenate([[epoch], values]).astype(_FLOAT)
    append_file(run / VALUES_FILE, row.tobytes())


def read_measurements(run: Path) -> Measurements | None:
    """Read what the instruments of a run measured; None for a run without.

    Raises:
        UserError: a file is damaged or cut short; names the file and what is wrong.
        StorageError: a file is there and cannot be read.
    """
    layout = run / LAYOUT_FILE
    if not layout.exists() and not (run / VALUES_FILE).exists():
        return None
    columns = _read_layout(layout)
    rows = _rows(run, columns, whole=True)
    values: dict[str, dict[str, np.ndarray]] = {}
    start = 1
    for instrument, layer, size in columns:
        values.setdefault(instrument, {})[layer] = rows[:, start : start + size]
        start += size
    return Measurements(rows[:, 0].astype(int), values)


def trim_measurements(run: Path, epochs: int) -> None:
    """Drop the rows after an epoch and a row cut short, so that a resumed run can append.

    Args:
        epochs: the last epoch to keep (that of the checkpoint); 0 drops all rows.

    Raises:
        UserError: a file is damaged.
        StorageError: it could not be written; the file is as before.
    """
    path = run / VALUES_FILE
    if not path.exists():
        return
    rows = _rows(run, _read_layout(run / LAYOUT_FILE), whole=False)
    data = rows[rows[:, 0] <= epochs].tobytes()
    if len(data) != _size(path):
        write_file(path, data)


_REMEDY = f"move {LAYOUT_FILE} and {VALUES_FILE} away to go on without the earlier measurements"


def _layout_text(columns: Columns) -> str:
    lines = [json.dumps({"instrument": name, "layer": layer, "size": size}) for name, layer, size in columns]
    body = ",\n  ".join(lines)
    return (
        f'{{"format": {FORMAT}, "values": "{VALUES_FILE}", "dtype": "little-endian float32", "row": "epoch, columns",\n'
        f'"columns": [\n  {body}\n]}}\n'
    )


def _read_layout(path: Path) -> list[tuple[str, str, int]]:
    try:
        layout = parse_json(_read(path))
        if layout["format"] != FORMAT:
            raise UserError(f"{path} is of format {layout['format']!r}; this norm-matters reads {FORMAT}")
        columns = [(entry["instrument"], entry["layer"], entry["size"]) for entry in layout["columns"]]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged: it says nothing valid about {VALUES_FILE}; {_REMEDY}") from error
    if not all(isinstance(n, str) and isinstance(layer, str) and _is_size(size) for n, layer, size in columns):
        raise UserError(f"{path} is damaged: a column is not (instrument, layer, size); {_REMEDY}")
    if len({column[:2] for column in columns}) < len(columns):
        raise UserError(f"{path} is damaged: a column occurs twice; {_REMEDY}")
    return columns


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def _rows(run: Path, columns: Columns, *, whole: bool) -> np.ndarray:
    """The rows (epochs, 1 + values) of the file; what follows the last whole one is an error, or left out."""
    path = run / VALUES_FILE
    data = _read(path) if path.exists() else b""
    width = 1 + sum(size for _, _, size in columns)
    count, rest = divmod(len(data), width * _FLOAT.itemsize)
    if rest and whole:
        raise UserError(f"{path} is cut short: {len(data)} bytes are no whole number of rows of {width} numbers")
    rows = np.frombuffer(data, _FLOAT, count * width).reshape(count, width)
    epochs = rows[:, 0]
    # Negated, so that NaN is found too.
    if not (np.all(epochs >= 1) and np.all(epochs == np.floor(epochs)) and np.all(np.diff(epochs) > 0)):
        raise UserError(f"{path} is damaged: the epochs of its rows do not count up; {_REMEDY}")
    return rows


def _read(path: Path) -> bytes:
    try:
        return read_regular(path, limit=LARGEST)
    except FileNotFoundError:
        raise UserError(f"{path} is missing; {_REMEDY}") from None
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}; {_REMEDY}") from None
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
