"""`trace.csv` of a run: fingerprints of the training at a few of its steps, for `norm-matters verify`. No torch."""

import re
from collections.abc import Sequence
from pathlib import Path

from norm_matters.core.errors import StorageError, UserError
from norm_matters.core.reading import read_regular
from norm_matters.record.files import append_file, write_file

TRACE_FILE = "trace.csv"
TRACE_COLUMNS = ("step", "loss", "weight_norm", "weights_blake2b")
# Three rows for each power of ten: the file of any run is smaller than this.
_LARGEST = 2**20
_HEADER = ",".join(TRACE_COLUMNS).encode() + b"\n"
_DIGEST = re.compile(r"[0-9a-f]{64}")

TraceRow = tuple[int, float, float, str]
"""Step, loss, norm of the weights, digest of the weights; see `engine.trace.Fingerprint`."""


def append_trace(run: Path, row: Sequence[int | float | str]) -> None:
    """Add a fingerprint to the trace of a run.

    Raises:
        StorageError: it could not be written.
    """
    assert len(row) == len(TRACE_COLUMNS)
    append_file(run / TRACE_FILE, _line(row), header=_HEADER)


def read_trace(run: Path) -> list[TraceRow]:
    """The fingerprints of a run in the order of their steps; a last line without its end is left out.

    Returns:
        Nothing where there is no such file: the run is older than traces.

    Raises:
        UserError: the file is damaged; names the line.
        StorageError: it is there and cannot be read.
    """
    path = run / TRACE_FILE
    try:
        lines = read_regular(path, limit=_LARGEST).decode("ascii").split("\n")[:-1]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged: {error}") from None
    if lines and lines[0] != _HEADER.decode().rstrip():
        raise UserError(f"{path}, line 1: the columns are not {', '.join(TRACE_COLUMNS)}")
    rows: list[TraceRow] = []
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(",")
        try:
            step, loss, norm, digest = int(cells[0]), float(cells[1]), float(cells[2]), cells[3]
        except (ValueError, IndexError):
            raise UserError(f"{path}, line {number}: it is no fingerprint") from None
        if len(cells) > len(TRACE_COLUMNS) or not _DIGEST.fullmatch(digest) or step <= (rows[-1][0] if rows else 0):
            raise UserError(f"{path}, line {number}: it is no fingerprint, or of no later step than the one before")
        rows.append((step, loss, norm, digest))
    return rows


def trim_trace(run: Path, step: int) -> None:
    """Drop the fingerprints of steps after one, and a line cut short, so that a resumed run takes them again.

    Raises:
        UserError: the file is damaged.
        StorageError: it could not be written; it is as before.
    """
    rows = read_trace(run)
    if not (run / TRACE_FILE).exists():
        return
    kept = [_line(row) for row in rows if row[0] <= step]
    # Without a row there is nothing to say; the header comes with the first.
    write_file(run / TRACE_FILE, b"".join([_HEADER, *kept]) if kept else b"")


def _line(row: Sequence[int | float | str]) -> bytes:
    """Numbers in the fewest digits that read back as the same number."""
    return (",".join(value if isinstance(value, str) else repr(value) for value in row) + "\n").encode()
