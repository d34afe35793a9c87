"""MNIST and the sets in its format: Fashion-MNIST, KMNIST. Files may be compressed, and are read in place."""

import gzip
import math
import struct
import zlib
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.fetch import data_folder, download, missing
from norm_matters.datasets.images import ResidentImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

DIGITS = tuple(map(str, range(10)))
CLOTHES = (
    *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
    *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
)
CHARACTERS = ("o", "ki", "su", "tsu", "na", "ha", "ma", "ya", "re", "wo")
# Debian's package dataset-fashion-mnist.
DEBIAN = {"fashion-mnist": Path("/usr/share/datasets/fashion-mnist")}
UNSIGNED_BYTE = 8
MAX_BYTES = 2**30
MAX_DIMENSIONS = 4


def read_idx(path: Path) -> np.ndarray:
    """Read an array of bytes in the idx format, plain or gzip-compressed.

    Format: two zero bytes, the type (8: unsigned byte), the number of dimensions, each as a big-endian 32-bit
    number, then the values, last dimension fastest. Source: the MNIST distribution's description.

    Returns:
        A writable uint8 array.

    Raises:
        UserError: naming the file, where it is cut short, longer than it says, or of another format.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            head = file.read(4)
            if len(head) < 4 or head[:2] != b"\0\0" or head[2] != UNSIGNED_BYTE:
                raise UserError(f"{path} is no idx file of bytes")
            if not 1 <= head[3] <= MAX_DIMENSIONS:
                raise UserError(f"{path} is damaged: it has {head[3]} dimensions")
            shape = struct.unpack(f">{head[3]}I", file.read(4 * head[3]))
            # One byte more than there should be tells a longer file, and a damaged head cannot fill the memory.
            values = file.read(min(math.prod(shape), MAX_BYTES) + 1)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    if len(values) != math.prod(shape):
        raise UserError(f"{path} is damaged: it should hold {math.prod(shape)} values")
    return np.frombuffer(bytearray(values), dtype=np.uint8).reshape(shape)


def read_set(
    data: "DataConfig", argument: str, *, name: str, title: str, classes: tuple[str, ...], flip: bool
) -> Source:
    """Read the four files of a set, wherever they are.

    Args:
        title: torchvision's name of the class and of the folder.
    """
    parts = {}
    for part in ("train", "t10k"):
        paths = [_find(data, name, title, f"{part}-{what}") for what in ("images-idx3-ubyte", "labels-idx1-ubyte")]
        pixels, labels = map(read_idx, paths)
        if pixels.ndim != 3 or pixels.shape[1] != pixels.shape[2] or labels.shape != pixels.shape[:1]:
            raise UserError(f"{paths[0]}: images {pixels.shape} and labels {labels.shape} do not belong together")
        parts[part] = ResidentImages(torch.from_numpy(pixels).unsqueeze(1), labels, title=str(paths[0]))
    return Source(train=parts["train"], val=parts["t10k"], classes=classes, flip=flip, pad=2, epochs=20)


def _find(data: "DataConfig", name: str, title: str, file: str) -> Path:
    """The path of a file, compressed or not; fetched where that is asked for."""
    base = data_folder(data)
    raw = base / title / "raw"
    folders = [raw, base / name, base]
    if data.dir is None and name in DEBIAN:
        folders.append(DEBIAN[name])
    candidates = [folder / (file + ending) for folder in folders for ending in ("", ".gz")]
    if not any(path.is_file() for path in candidates) and data.download:
        download(title, base)
    for path in candidates:
        if path.is_file():
            return path
    raise missing(raw / file)


MNIST = DatasetEntry(partial(read_set, name="mnist", title="MNIST", classes=DIGITS, flip=False))
KMNIST = DatasetEntry(partial(read_set, name="kmnist", title="KMNIST", classes=CHARACTERS, flip=False))
FASHION_MNIST = DatasetEntry(partial(read_set, name="fashion-mnist", title="FashionMNIST", classes=CLOTHES, flip=True))
