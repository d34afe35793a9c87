"""Images in parquet files that are too large for memory: a row group is read when one of its images is asked for."""

import hashlib
import os
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.order import WINDOW
from norm_matters.datasets.stored import Store

# Bytes of row groups that each process keeps, and how much of that the images of a shuffling window take.
KEPT_BYTES = 2**28
WINDOW_SHARE = 3 / 4
# However large row groups are, so many are kept: the window covers parts of two, and a batch may lie across its end.
MIN_KEPT = 3
# Files that a process keeps open: what they say of their row groups may take megabytes.
MAX_OPEN = 8
# Images hardly shrink: a file that unpacks to more than so many times its size is an attack. Small ones may.
MAX_RATIO = 100
SMALL_FILE = 2**28


class Groups(NamedTuple):
    """The row groups of some files.

    Attributes:
        files: number of the file that each is in.
        numbers: of each within its file.
        rows: in each.
        sizes: bytes of each one's images, unpacked.
    """

    files: np.ndarray
    numbers: np.ndarray
    rows: np.ndarray
    sizes: np.ndarray


@final
class RowGroups(Store):
    """Images in a column of parquet files.

    Args:
        files: the files.
        column: of {bytes, path}.
        groups: their row groups, in order.
    """

    def __init__(self, files: Sequence[Path], column: str, groups: Groups) -> None:
        self.files, self.column, self.groups = files, column, groups
        self.ends = np.cumsum(groups.rows, dtype=np.int64)
        self.blocks = np.repeat(np.arange(len(groups.rows)), groups.rows)
        mean = max(1, int(groups.sizes.sum()) // max(1, int(groups.rows.sum())))
        self.window = int(min(WINDOW, max(1, WINDOW_SHARE * KEPT_BYTES / mean)))
        self._kept: OrderedDict[int, Any] = OrderedDict()
        self._open: dict[int, Any] = {}
        self._process = os.getpid()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": OrderedDict(), "_open": {}}

    def read(self, number: int) -> bytes:
        """The bytes of one image."""
        group = int(np.searchsorted(self.ends, number, side="right"))
        row = number - (int(self.ends[group - 1]) if group else 0)
        try:
            content = self._group(group)[row].as_py()
        except (IndexError, AttributeError):
            raise UserError(f"{self.name(number)}: the file has changed since it was opened") from None
        if not content:
            raise UserError(f"{self.name(number)} has no bytes in column '{self.column}'")
        return content

    def name(self, number: int) -> str:
        """The file and the row."""
        group = int(np.searchsorted(self.ends, number, side="right"))
        file = self.groups.files[group]
        first = int(np.searchsorted(self.groups.files, file))
        return f"{self.files[file]}, row {number - (int(self.ends[first - 1]) if first else 0)}"

    def digest(self) -> str:
        """SHA-256 of the files' names and sizes, and of rows and bytes of each row group."""
        digest = hashlib.sha256()
        for file in self.files:
            digest.update(f"{file.name}\0{os.stat(file).st_size}\0".encode(errors="surrogateescape"))
        for array in self.groups:
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        return digest.hexdigest()

    def _group(self, group: int) -> Any:
        """The column of bytes of a row group, as arrow has it."""
        if self._process != os.getpid():
            # What a forked worker inherits is not its own: it would keep its parent's groups for ever.
            self._kept, self._open, self._process = OrderedDict(), {}, os.getpid()
        if group in self._kept:
            self._kept.move_to_end(group)
            return self._kept[group]
        sizes, needed = self.groups.sizes, int(self.groups.sizes[group])
        while len(self._kept) >= MIN_KEPT and needed + sum(int(sizes[kept]) for kept in self._kept) > KEPT_BYTES:
            self._kept.popitem(last=False)
        self._kept[group] = self._load(int(self.groups.files[group]), int(self.groups.numbers[group]))
        return self._kept[group]

    def _load(self, file: int, number: int) -> Any:
        import pyarrow as pa

        try:
            if file not in self._open:
                while len(self._open) >= MAX_OPEN:
                    self._open.pop(next(iter(self._open)))
                self._open[file] = open_parquet(self.files[file])
            table = self._open[file].read_row_group(number, columns=[f"{self.column}.bytes"], use_threads=False)
            return pa.chunked_array([chunk.field("bytes") for chunk in table.column(0).chunks])
        except (OSError, KeyError, pa.ArrowException) as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{self.files[file]}, row group {number} cannot be read: {reason}") from None


def open_parquet(file: Path) -> Any:
    """Open a file that a stranger may have made: nothing is read of it that unpacks to more than it can hold.

    Returns:
        A pyarrow.parquet.ParquetFile.

    Raises:
        UserError: it is no regular file, or says that it has more rows than bytes, or unpacks to far more.
        OSError, pyarrow.ArrowException: it cannot be read.
    """
    import pyarrow.parquet as pq

    if not file.is_file():
        raise UserError(f"{file} is no file")
    found, size = pq.ParquetFile(file), os.stat(file).st_size
    groups = [found.metadata.row_group(number) for number in range(found.metadata.num_row_groups)]
    rows, unpacked = sum(group.num_rows for group in groups), sum(group.total_byte_size for group in groups)
    if not 0 <= rows <= size or not 0 <= unpacked <= max(SMALL_FILE, MAX_RATIO * size):
        raise UserError(f"{file} says that its {size:,} bytes unpack to {rows:,} rows of {unpacked:,} bytes")
    return found


def read_groups(files: Sequence[Path], column: str) -> Groups:
    """The row groups of files.

    Raises:
        UserError: naming the file that cannot be read, or lacks the column.
    """
    import pyarrow as pa

    found: list[tuple[int, int, int, int]] = []
    for place, file in enumerate(files):
        try:
            metadata = open_parquet(file).metadata
            paths = [metadata.schema.column(n).path for n in range(metadata.num_columns)]
            leaf = paths.index(f"{column}.bytes")
            for number in range(metadata.num_row_groups):
                group = metadata.row_group(number)
                if group.num_rows:
                    found.append((place, number, group.num_rows, group.column(leaf).total_uncompressed_size))
        except (OSError, ValueError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    return Groups(*np.array(found, dtype=np.int64).reshape(-1, 4).T)
