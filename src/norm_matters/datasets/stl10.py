"""STL-10: the labelled images. torchvision's reader would want the 2.6 GB of unlabelled ones too."""

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

IMAGE_SHAPE = (3, 96, 96)
FOLDER = "stl10_binary"


def read_stl10(data: "DataConfig", argument: str) -> Source:
    """Read `stl10_binary/{train,test}_{X,y}.bin` and `class_names.txt`."""
    base = data_folder(data)
    files = ("train_X.bin", "train_y.bin", "test_X.bin", "test_y.bin", "class_names.txt")
    paths = [base / FOLDER / file for file in files]
    if data.download and not all(path.is_file() for path in paths):
        download("STL10", base)
    for path in paths:
        if not path.is_file():
            raise missing(path)
    return Source(
        train=_read_part(paths[0], paths[1]),
        val=_read_part(paths[2], paths[3]),
        classes=tuple(paths[4].read_text().split()),
        pad=12,
        epochs=160,
    )


def _read_part(images: Path, labels: Path) -> ResidentImages:
    pixels, numbers = np.fromfile(images, dtype=np.uint8), np.fromfile(labels, dtype=np.uint8)
    if pixels.size != numbers.size * np.prod(IMAGE_SHAPE):
        raise UserError(f"{images} is damaged: {pixels.size} bytes are not {numbers.size} images of 3x96x96")
    # Columns come first in the file, and classes count from 1.
    pixels = pixels.reshape(-1, *IMAGE_SHAPE).transpose(0, 1, 3, 2)
    return ResidentImages(
        torch.from_numpy(np.ascontiguousarray(pixels)), numbers.astype(np.int64) - 1, title=str(images)
    )


STL10 = DatasetEntry(read_stl10)
