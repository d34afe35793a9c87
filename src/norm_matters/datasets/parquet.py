"""Parquet files in the layout of the Hugging Face hub: a column of image bytes, a column of labels."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.images import EncodedImages, ResidentImages
from norm_matters.transforms.image import to_pixels

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

LABEL_COLUMNS = ("label", "labels", "fine_label")
# How the files to evaluate on begin, the first kind that exists; and what to call them.
VAL_NAMES = {"validation": "validation", "test": "test"}
# Up to this side in pixels, images of one size are decoded once and held in memory.
RESIDENT_SIDE = 64


class _Part(NamedTuple):
    """The rows of some files: bytes of the images, labels as they stand there, what to call each row."""

    contents: list[bytes]
    labels: list[int | str]
    names: list[str]


def read_parquet(data: "DataConfig", argument: str) -> Source:
    """Read `train*.parquet` with `validation*` or `test*.parquet`, in a folder or its subfolder `data`, or one file.

    A single file gets a holdout. Small images of one size are held in memory decoded, others encoded. Names of
    classes come from the Hugging Face metadata, or from labels that are text; otherwise they are numbers.

    Args:
        argument: the folder or file; relative to `data.dir` where that is given.
    """
    path = Path(data.dir or "").expanduser() / Path(argument).expanduser()
    root = path if path.is_dir() else path.parent
    train_files, val_files, val_name = _find(path)
    image, label, class_names = _columns(train_files[0])
    train = _read(train_files, image, label)
    classes = class_names or _classes(train.labels)
    encoded = [_images(train, classes, root)]
    if val_files:
        encoded.append(_images(_read(val_files, image, label), classes, root))
    parts = _resident(encoded) or encoded
    val = parts[1] if val_files else None
    return Source(train=parts[0], val=val, classes=classes, val_name=val_name, pad=4, epochs=30)


def _find(path: Path) -> tuple[list[Path], list[Path], str]:
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
    pa, pq = _pyarrow()
    try:
        schema = pq.read_schema(file)
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
        return tuple(map(str, json.loads(metadata or b"")["info"]["features"][label]["names"]))
    except (ValueError, KeyError, TypeError):  # the metadata are a courtesy of the writer
        return None


def _read(files: Sequence[Path], image: str, label: str) -> _Part:
    pa, pq = _pyarrow()
    part = _Part([], [], [])
    for file in files:
        try:
            table = pq.read_table(file, columns=[image, label])
            columns = table.column(image).to_pylist(), table.column(label).to_pylist()
        except (OSError, KeyError, pa.ArrowException) as error:
            raise UserError(f"{file} cannot be read: {_line(error)}") from None
        for row, (cell, value) in enumerate(zip(*columns, strict=True)):
            name = f"{file.name}, row {row}"
            if not cell or not cell["bytes"]:
                raise UserError(f"{file.parent / name} has no bytes in column '{image}'")
            if not isinstance(value, int | str):
                raise UserError(f"{file.parent / name}: label '{value}' is neither a number nor text")
            part.contents.append(cell["bytes"])
            part.labels.append(value)
            part.names.append(name)
    return part


def _classes(labels: list[int | str]) -> tuple[str, ...]:
    """Names of classes that no metadata give: the labels themselves."""
    texts = {label for label in labels if isinstance(label, str)}
    numbers = [label for label in labels if isinstance(label, int)]
    return tuple(sorted(texts)) if texts else tuple(map(str, range(max(numbers, default=-1) + 1)))


def _images(part: _Part, classes: tuple[str, ...], root: Path) -> EncodedImages:
    numbers = {name: number for number, name in enumerate(classes)}
    labels = []
    for label, name in zip(part.labels, part.names, strict=True):
        if isinstance(label, str) and label not in numbers:
            raise UserError(f"{root / name}: label '{label}' is none of the {len(classes)} classes")
        labels.append(numbers[label] if isinstance(label, str) else label)
    return EncodedImages(part.names, np.array(labels), root=root, contents=part.contents)


def _resident(parts: list[EncodedImages]) -> list[ResidentImages] | None:
    """The images decoded, where all are squares of one size that is small enough; else None."""
    if not all(len(part) for part in parts):
        return None
    side = parts[0].image(0).width
    if side > RESIDENT_SIDE:
        return None
    decoded = []
    for part in parts:
        pixels = torch.empty(len(part), 3, side, side, dtype=torch.uint8)
        for index in range(len(part)):
            image = part.image(index)
            if image.size != (side, side):
                return None
            pixels[index] = to_pixels(image)
        decoded.append(ResidentImages(pixels, part.labels, title=str(part.root)))
    return decoded


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError("parquet datasets need pyarrow: pip install 'norm-matters[parquet]'") from None
    return pyarrow, pyarrow.parquet


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


PARQUET = DatasetEntry(read_parquet)
