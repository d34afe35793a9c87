"""CIFAR-10 and CIFAR-100 in their Python form.

Their files are pickles: torchvision opens them, and only after their checksums have been found to be the known ones.
"""

import warnings
from functools import partial
from typing import TYPE_CHECKING

import numpy as np
import torch

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.fetch import data_folder, download, missing
from norm_matters.datasets.images import ResidentImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig


def read_cifar(data: "DataConfig", argument: str, *, title: str) -> Source:
    """Read both parts; `title` is torchvision's name of the class."""
    from norm_matters.core.torchvision import torchvision

    reader = getattr(torchvision.datasets, title)
    base = data_folder(data)
    needed = [file for file, _ in [*reader.train_list, *reader.test_list]] + [reader.meta["filename"]]
    paths = [base / reader.base_folder / file for file in needed]
    if data.download and not all(path.is_file() for path in paths):
        download(title, base)
    for path in paths:
        if not path.is_file():
            raise missing(path)
    parts = {}
    for train in (True, False):
        try:
            with warnings.catch_warnings():
                # The old pickles name numpy's types in a way that newer versions warn of.
                warnings.simplefilter("ignore")
                part = reader(str(base), train=train)
        except RuntimeError as error:
            raise UserError(f"{base / reader.base_folder} is damaged: a checksum is not the known one") from error
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2)
        parts[train] = ResidentImages(pixels, np.array(part.targets), title=f"{title} {'train' if train else 'test'}")
    return Source(train=parts[True], val=parts[False], classes=tuple(part.classes), pad=4, epochs=160)


CIFAR10 = DatasetEntry(partial(read_cifar, title="CIFAR10"))
CIFAR100 = DatasetEntry(partial(read_cifar, title="CIFAR100"))
