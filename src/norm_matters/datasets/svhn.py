"""Street View House Numbers, cropped digits."""

from typing import TYPE_CHECKING

import numpy as np
import torch

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.fetch import data_folder, download, missing
from norm_matters.datasets.images import ResidentImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig


def read_svhn(data: "DataConfig", argument: str) -> Source:
    """Read `train_32x32.mat` and `test_32x32.mat` below the data folder, or in its folder `svhn`."""
    from norm_matters.core.torchvision import torchvision

    reader = torchvision.datasets.SVHN
    base = data_folder(data)
    folder = base if (base / reader.split_list["train"][1]).is_file() else base / "svhn"
    parts = []
    for split in ("train", "test"):
        path = folder / reader.split_list[split][1]
        if data.download and not path.is_file():
            download("SVHN", folder, split=split)
        if not path.is_file():
            raise missing(path)
        try:
            part = reader(str(folder), split=split)
        except RuntimeError as error:
            raise UserError(f"{path} is damaged: its checksum is not the known one") from error
        parts.append(ResidentImages(torch.from_numpy(np.ascontiguousarray(part.data)), part.labels, title=str(path)))
    # A mirrored digit is another sign, or none.
    return Source(train=parts[0], val=parts[1], classes=tuple(map(str, range(10))), flip=False, pad=4, epochs=160)


SVHN = DatasetEntry(read_svhn)
