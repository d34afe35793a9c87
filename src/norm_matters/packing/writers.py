"""The files of a packed dataset: the same images give the same bytes, whenever and wherever they are written."""

import hashlib
import io
import json
import tarfile
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, final

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.names import Names
from norm_matters.datasets.shards import Shard
from norm_matters.packing.settings import Format

# Of a row group: bytes of images, and rows. Readers that know no better hold a whole one in memory.
GROUP_BYTES, GROUP_ROWS = 2**24, 1000
RECORD = 512


class ShardWriter(ABC):
    """Writes one shard into a stream."""

    @abstractmethod
    def add(self, key: str, ending: str, content: bytes, label: int) -> None:
        """Append an image.

        Args:
            key: what it is called.
            ending: of a file's name, for its format.
        """

    @abstractmethod
    def close(self) -> None:
        """Write what belongs to the end."""


def shard_writer(kind: Format, stream: BinaryIO, classes: Sequence[str]) -> ShardWriter:
    """The writer of a format."""
    return _TarWriter(stream) if kind == "webdataset" else _ParquetWriter(stream, classes)


def ending_of(kind: Format) -> str:
    """How the names of its files end."""
    return ".tar" if kind == "webdataset" else ".parquet"


def bytes_in_shard(kind: Format, sizes: np.ndarray) -> np.ndarray:
    """How many bytes a shard grows by images of so many: in a tar each has a header, padding, and a label likewise."""
    return sizes + -sizes % RECORD + 3 * RECORD if kind == "webdataset" else sizes


@final
class HashingStream(io.RawIOBase):
    """Passes on what is written, counts it and hashes it."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream, self.count, self.sha256 = stream, 0, hashlib.sha256()

    def writable(self) -> bool:
        """Yes."""
        return True

    def tell(self) -> int:
        """Bytes so far."""
        return self.count

    def write(self, data: Any) -> int:
        """Write bytes."""
        view = memoryview(data).cast("B")
        self.sha256.update(view)
        self.stream.write(view)
        self.count += len(view)
        return len(view)


@final
class _TarWriter(ShardWriter):
    """KEY.ENDING and KEY.cls in a plain tar archive. Its headers hold no time, owner or anything else that varies."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream

    def add(self, key: str, ending: str, content: bytes, label: int) -> None:
        self._member(f"{key}.{ending}", content)
        self._member(f"{key}.cls", str(label).encode())

    def close(self) -> None:
        self.stream.write(bytes(2 * RECORD))

    def _member(self, name: str, content: bytes) -> None:
        header = tarfile.TarInfo(name)
        header.size = len(content)
        self.stream.write(header.tobuf(tarfile.USTAR_FORMAT))
        self.stream.write(content)
        self.stream.write(bytes(-len(content) % RECORD))


@final
class _ParquetWriter(ShardWriter):
    """The layout of the Hugging Face hub, without compression or dictionary: images stand in the file as they are."""

    def __init__(self, stream: BinaryIO, classes: Sequence[str]) -> None:
        pa, pq = pyarrow()
        features = {"image": {"_type": "Image"}, "label": {"names": list(classes), "_type": "ClassLabel"}}
        metadata = {"huggingface": json.dumps({"info": {"features": features}})}
        self.image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        self.schema = pa.schema([("image", self.image), ("label", pa.int64())], metadata=metadata)
        self.rows: list[tuple[bytes, str, int]] = []
        self.size = 0
        # Statistics would repeat the least and the greatest image of each group.
        self.writer = pq.ParquetWriter(
            stream, self.schema, compression="none", use_dictionary=False, write_statistics=["label"]
        )

    def add(self, key: str, ending: str, content: bytes, label: int) -> None:
        if self.rows and (self.size + len(content) > GROUP_BYTES or len(self.rows) == GROUP_ROWS):
            self._flush()
        self.rows.append((content, f"{key}.{ending}", label))
        self.size += len(content)

    def close(self) -> None:
        self._flush()
        self.writer.close()

    def _flush(self) -> None:
        if self.rows:
            pa, _ = pyarrow()
            contents, paths, labels = zip(*self.rows, strict=True)
            children = [pa.array(contents, pa.binary()), pa.array(paths, pa.string())]
            image = pa.StructArray.from_arrays(children, fields=list(self.image))
            table = pa.Table.from_arrays([image, pa.array(labels, pa.int64())], schema=self.schema)
            self.writer.write_table(table, row_group_size=len(self.rows))
        self.rows, self.size = [], 0


def scan_parquet(file: Path) -> Shard:
    """Where the images lie in a file of ours, which holds them as they are.

    Raises:
        UserError: it cannot be read, or holds them otherwise.
    """
    pa, pq = pyarrow()
    offsets, sizes, labels, keys = list[int](), list[int](), list[int](), list[str]()
    try:
        parquet = pq.ParquetFile(file)
        with file.open("rb") as stream:
            for number in range(parquet.num_row_groups):
                chunk = parquet.metadata.row_group(number).column(0)
                stream.seek(chunk.data_page_offset)
                stored = stream.read(chunk.total_compressed_size)
                place = 0
                for row in parquet.read_row_group(number, use_threads=False).to_pylist():
                    content = row["image"]["bytes"]
                    # Its length stands before it: an image may hold another one.
                    found = stored.find(len(content).to_bytes(4, "little") + content, place)
                    if found < 0:
                        raise UserError(f"{file}: it was not written by `data pack`, or is damaged")
                    place = found + 4 + len(content)
                    offsets.append(chunk.data_page_offset + found + 4)
                    sizes.append(len(content))
                    labels.append(row["label"])
                    keys.append(row["image"]["path"])
    except (OSError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{file} cannot be read: {' '.join(str(error).split())}") from None
    columns = [np.array(column, dtype=np.int64) for column in (offsets, sizes, labels)]
    return Shard(columns[0], columns[1], columns[2], Names.of(keys))


def pyarrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`; UserError where they are missing."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("--format: parquet needs pyarrow: pip install 'norm-matters[parquet]'") from None
    return pyarrow, pyarrow.parquet
