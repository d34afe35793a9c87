"""scikit-learn's handwritten digits: 1,797 gray images of 8x8 pixels, part of its package."""

import gzip
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from norm_matters.datasets.entry import DatasetEntry, Source, stratified_split
from norm_matters.datasets.images import ResidentImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

TEST_SHARE = 0.2
# The test images are the same for every run.
SPLIT_SEED = 0


def read_digits(data: "DataConfig", argument: str) -> Source:
    """The digits, a stratified fifth of them as test images. Source: sklearn.datasets.load_digits."""
    table = _table()
    # Ink from 0 to 16 becomes bytes.
    pixels = np.rint(table[:, :64].reshape(-1, 1, 8, 8) * (255 / 16)).astype(np.uint8)
    images = ResidentImages(torch.from_numpy(pixels), table[:, 64].astype(np.int64), title="digits")
    train, test = stratified_split(images.labels, TEST_SHARE, SPLIT_SEED)
    return Source(
        train=images.subset(train),
        val=images.subset(test),
        classes=tuple(map(str, range(10))),
        flip=False,
        pad=1,
        epochs=20,
    )


def _table() -> np.ndarray:
    """A row for each image: 64 values of ink, and the digit; (1797, 65)."""
    package = find_spec("sklearn")
    file = Path(package.origin or "").parent / "datasets" / "data" / "digits.csv.gz" if package else None
    # Only the file is needed: importing scikit-learn takes longer than the rest of the way to the first step.
    if file and file.is_file():
        with gzip.open(file, "rt") as stream:
            return np.loadtxt(stream, delimiter=",")
    from sklearn.datasets import load_digits

    pixels, labels = load_digits(return_X_y=True)
    return np.column_stack([pixels, labels])


DIGITS = DatasetEntry(read_digits)
