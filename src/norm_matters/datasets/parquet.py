"""Parquet files in the layout of the Hugging Face hub: a column of image bytes, a column of labels."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final, overload

import numpy as np
import torch

from norm_matters.core.errors import UserError
from norm_matters.core.json import parse_json
from norm_matters.datasets.cache import cache_key, read_cached, write_cached
from norm_matters.datasets.entry import DatasetEntry, Source, numbered_classes
from norm_matters.datasets.images import EncodedImages, Images, ResidentImages, decode_image, file_size
from norm_matters.datasets.manifest import PackedShard, packed_shards, read_manifest
from norm_matters.datasets.rowgroups import RowGroups, open_parquet, read_groups
from norm_matters.datasets.stored import LARGE, StoredImages, stored_images

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

LABEL_COLUMNS = ("label", "labels", "fine_label")
# How the files to evaluate on begin, the first kind that exists; and what to call them.
VAL_NAMES = {"validation": "validation", "test": "test"}
# Up to this side in pixels, images of one size are decoded once and held in memory, where they take no more than this
# share of it.
RESIDENT_SIDE = 64
MEMORY_SHARE = 1 / 4
# From so many images on, what was decoded is kept on disk; below, decoding takes less than half a second.
CACHED_FROM = 4096
# Bytes that an encoded image of `RESIDENT_SIDE` has at most: files with more per image are not hashed for nothing.
SMALL_FILE = 4 * RESIDENT_SIDE**2
# Rows read at a time.
BATCH = 1024


class _Part(NamedTuple):
    """The rows of some files: where the images are, labels as they stand there, what to call each row."""

    files: Sequence[Path]
    column: str
    labels: list[int | str]
    names: "_RowNames"


def read_parquet(data: "DataConfig", argument: str, *, decode: bool = True) -> Source:
    """Read `train*.parquet` with `validation*` or `test*.parquet`, in a folder or its subfolder `data`, or one file.

    A single file gets a holdout. Names of classes come from the Hugging Face metadata, or from labels that are text;
    otherwise they are numbers.

    Args:
        argument: the folder or file; relative to `data.dir` where that is given.
        decode: see `read_files`.
    """
    path = Path(data.dir or "").expanduser() / Path(argument).expanduser()
    train_files, val_files, val_name = find_files(path)
    return read_files(train_files, val_files, val_name, decode=decode)


def read_files(train_files: list[Path], val_files: list[Path], val_name: str, *, decode: bool = True) -> Source:
    """Read parquet files.

    Small images of one size are held in memory decoded, and kept on disk for the next time (see `datasets.cache`).
    Others stay encoded: read where they lie in files that `data pack` wrote, held in memory up to 1 GiB of files, and
    beyond that read by row group.

    Args:
        val_files: none: the training images get a holdout.
        decode: whether small images are held decoded.
    """
    root = train_files[0].parent
    image, label, class_names = _columns(train_files[0])
    parts = [_read(files, image, label) for files in (train_files, val_files) if files]
    classes = class_names or _classes(parts[0].labels)
    labels = [_numbers(part, classes, root) for part in parts]
    total = sum(file_size(str(file)) for part in parts for file in part.files)
    large = total >= LARGE
    images: Sequence[Images] | None = None
    if decode and (not large or total <= SMALL_FILE * sum(len(part.names) for part in parts)):
        images = _resident(parts, labels, root)
    if images is None:
        manifest = read_manifest(root)
        packed = packed_shards(root, manifest) if manifest and manifest.format == "parquet" else {}
        images = [_encoded(part, numbers, packed, large) for part, numbers in zip(parts, labels, strict=True)]
    val = images[1] if val_files else None
    return Source(train=images[0], val=val, classes=classes, val_name=val_name, pad=4, epochs=30)


def _encoded(part: _Part, labels: np.ndarray, packed: dict[str, PackedShard], large: bool) -> Images:
    known = [packed[file.name] for file in part.files if file.name in packed]
    if len(known) == len(part.files) and sum(len(one.shard.sizes) for one in known) == len(labels):
        facts = [
            f"{file.name} {file_size(str(file))} {one.sha256}" for file, one in zip(part.files, known, strict=True)
        ]
        return stored_images(part.files, [one.shard for one in known], facts, labels=labels)
    if large:
        return StoredImages(RowGroups(part.files, part.column, read_groups(part.files, part.column)), labels)
    return EncodedImages(part.names, labels, root=part.files[0].parent, contents=list(_contents(part)))


def find_files(path: Path) -> tuple[list[Path], list[Path], str]:
    """The files to train on, those to evaluate on (or none), and what these are."""
    if path.is_file():
        return [path], [], ""
    if not path.is_dir():
        raise UserError(f"dataset 'parquet:{path}': there is no such folder or file")
    for folder in (path, path / "data"):
        train = sorted(folder.glob("train*.parquet"))
        if train:
            for start, val_name in VAL_NAMES.items():
                if val := sorted(folder.glob(f"{start}*.parquet")):
                    return train, val, val_name
            return train, [], ""
    raise UserError(f"dataset 'parquet:{path}': {path / 'train*.parquet'} is missing")


def _columns(file: Path) -> tuple[str, str, tuple[str, ...] | None]:
    """Names of the columns of images and labels, and of the classes where the file has them."""
    pa = _pyarrow()
    try:
        schema = open_parquet(file).schema_arrow
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file} is no parquet file: {_line(error)}") from None
    image = next((f.name for f in schema if pa.types.is_struct(f.type) and f.type.get_field_index("bytes") >= 0), None)
    label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
    if image is None or label is None:
        wanted = "column of images {bytes, path}" if image is None else f"column '{LABEL_COLUMNS[0]}'"
        raise UserError(f"{file} has no {wanted}; it has: {', '.join(schema.names)}")
    return image, label, _class_names((schema.metadata or {}).get(b"huggingface"), label)


def _class_names(metadata: bytes | None, label: str) -> tuple[str, ...] | None:
    try:
        return tuple(map(str, parse_json(metadata or b"")["info"]["features"][label]["names"]))
    except (ValueError, KeyError, TypeError):  # the metadata are a courtesy of the writer
        return None


def _read(files: Sequence[Path], image: str, label: str) -> _Part:
    pa = _pyarrow()
    labels: list[int | str] = []
    rows: list[int] = []
    for file in files:
        try:
            # Not `read_table`, which imports a second of code.
            values = open_parquet(file).read(columns=[label]).column(label).to_pylist()
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {_line(error)}") from None
        for row, value in enumerate(values):
            if not isinstance(value, (int, str)):
                raise UserError(f"{file}, row {row}: label '{value}' is neither a number nor text")
        labels.extend(values)
        rows.append(len(values))
    return _Part(files, image, labels, _RowNames(files, rows))


@final
class _RowNames(Sequence[str]):
    """What to call each row: the file's name and the number in it."""

    def __init__(self, files: Sequence[Path], rows: Sequence[int]) -> None:
        self.titles = [file.name for file in files]
        self.ends = list(accumulate(rows))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[n] for n in range(len(self))[index]]
        index = range(len(self))[index]
        file = bisect_right(self.ends, index)
        return f"{self.titles[file]}, row {index - (self.ends[file - 1] if file else 0)}"


def _contents(part: _Part) -> Iterator[bytes]:
    """The bytes of each image."""
    pa = _pyarrow()
    for file in part.files:
        row = 0
        try:
            for batch in open_parquet(file).iter_batches(BATCH, columns=[part.column]):
                for cell in batch.column(part.column).to_pylist():
                    if not cell or not cell["bytes"]:
                        raise UserError(f"{file}, row {row} has no bytes in column '{part.column}'")
                    yield cell["bytes"]
                    row += 1
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {_line(error)}") from None


def _classes(labels: list[int | str]) -> tuple[str, ...]:
    """Names of classes that no metadata give: the labels themselves."""
    texts = {label for label in labels if isinstance(label, str)}
    numbers = [label for label in labels if isinstance(label, int)]
    return tuple(sorted(texts)) if texts else numbered_classes(max(numbers, default=-1))


def _numbers(part: _Part, classes: tuple[str, ...], root: Path) -> np.ndarray:
    """The labels as numbers; UserError for a text that is no class."""
    numbers: dict[int | str, int] = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(label, -1) if isinstance(label, str) else label for label in part.labels]
    for row, label in enumerate(labels):
        if label == -1 and isinstance(text := part.labels[row], str):
            raise UserError(f"{root / part.names[row]}: label '{text}' is none of the {len(classes)} classes")
        if not -(2**62) < label < 2**62:
            raise UserError(f"{root / part.names[row]}: label {label} is out of range")
    return np.array(labels, dtype=np.int64)


def _resident(parts: list[_Part], labels: list[np.ndarray], root: Path) -> list[ResidentImages] | None:
    """The images decoded, where all are squares of one size and there is room; else None."""
    resident: list[ResidentImages] = []
    for part, numbers in zip(parts, labels, strict=True):
        images = _decoded(part, numbers, root)
        if images is None or images.pixels.shape[1:] != (resident or [images])[0].pixels.shape[1:]:
            return None
        resident.append(images)
    return resident


def _decoded(part: _Part, labels: np.ndarray, root: Path) -> ResidentImages | None:
    """The images of a part, from the disk where they were decoded before; None where they stay encoded."""
    key, count = "", len(part.names)
    if count >= CACHED_FROM and sum(file_size(str(file)) for file in part.files) <= count * SMALL_FILE:
        key = cache_key(part.files, part.column, hashlib.sha256(labels.tobytes()).hexdigest())
        found = read_cached(key)
        if found is not None and len(found[0]) == count:
            return ResidentImages(found[0], labels, title=str(root), digest=found[1])
    pixels = _decode_all(part, root)
    if pixels is None:
        return None
    images = ResidentImages(pixels, labels, title=str(root))
    if key:
        write_cached(key, images.pixels, images.digest())
    return images


def _decode_all(part: _Part, root: Path) -> torch.Tensor | None:
    """The pixels of all images, uint8 (N, 3, S, S); None where there are none, or they differ in size or are large."""
    count, nhwc = len(part.names), np.empty((0, 0, 0, 3), np.uint8)
    for index, content in enumerate(_contents(part)):
        image = decode_image(content, 3, name=str(root / part.names[index]))
        if not index:
            side = image.width
            room = MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
            if side > RESIDENT_SIDE or 3 * side * side * count > room:
                return None
            nhwc = np.empty((count, side, side, 3), np.uint8)
        if image.size != nhwc.shape[1:3]:
            return None
        nhwc[index] = np.asarray(image)
    return torch.from_numpy(nhwc).permute(0, 3, 1, 2) if count else None


def _pyarrow() -> Any:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet datasets need pyarrow: pip install 'norm-matters[parquet]'") from None
    return pyarrow


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


PARQUET = DatasetEntry(read_parquet, partial(read_parquet, decode=False))
