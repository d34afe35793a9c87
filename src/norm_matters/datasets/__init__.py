"""Where images come from, and how they reach the network in batches.

A new source is one file with an `ENTRY` and one `register` line here. Importing this package imports no torch;
its names are loaded at first use.
"""

from typing import TYPE_CHECKING

from norm_matters.core.errors import UserError
from norm_matters.core.lazy import lazy_attributes
from norm_matters.core.registry import Registry

if TYPE_CHECKING:
    from norm_matters.datasets.entry import Dataset, DatasetEntry, load_dataset
    from norm_matters.datasets.images import EncodedImages, ResidentImages, decode_image
    from norm_matters.datasets.loader import Batch, Loader
    from norm_matters.datasets.workers import Workers

__all__ = [
    "DATASETS",
    "Batch",
    "Dataset",
    "DatasetEntry",
    "EncodedImages",
    "Loader",
    "ResidentImages",
    "Workers",
    "check_dataset",
    "decode_image",
    "load_dataset",
]

DATASETS: Registry["DatasetEntry"] = Registry("dataset")
for _name, _module, _summary in (
    ("digits", "digits", "scikit-learn's 1,797 handwritten digits, 8x8 gray, 10 classes; no download"),
    ("fashion-mnist", "idx", "70,000 pieces of clothing, 28x28 gray, 10 classes"),
    ("mnist", "idx", "70,000 handwritten digits, 28x28 gray, 10 classes"),
    ("kmnist", "idx", "70,000 cursive Japanese characters, 28x28 gray, 10 classes"),
    ("cifar10", "cifar", "60,000 photographs, 32x32 RGB, 10 classes"),
    ("cifar100", "cifar", "60,000 photographs, 32x32 RGB, 100 classes"),
    ("svhn", "svhn", "99,289 house numbers, 32x32 RGB, 10 classes"),
    ("stl10", "stl10", "13,000 photographs, 96x96 RGB, 10 classes"),
    ("imagenet", "imagenet", "ILSVRC 2012, as its archives or Kaggle's unpack (get it yourself), 1,000 classes"),
    ("imagefolder", "folder", "imagefolder:DIR, your images: DIR/train/CLASS/* and DIR/val/CLASS/*, or DIR/CLASS/*"),
    ("parquet", "parquet", "parquet:DIR_OR_FILE, Hugging Face image layout: train*.parquet and test*|validation*"),
    (
        "webdataset",
        "webdataset",
        "webdataset:PATTERN, tar shards: a folder, train-{000..146}.tar, or {train,val}-*.tar",
    ),
    ("hf", "huggingface", "hf:ORG/NAME[:CONFIG], images in the local Hugging Face cache; --download fetches them"),
    ("random", "noise", "generated noise, 32x32 RGB, 10 classes; for benchmarks"),
):
    _attribute = f"{_name.upper().replace('-', '_')}"
    DATASETS.register(_name, f"{__name__}.{_module}:{_attribute}", summary=_summary)

# The sources whose name goes on after a colon, and what stands there.
ARGUMENTS = {"imagefolder": "DIR", "parquet": "DIR_OR_FILE", "webdataset": "PATTERN", "hf": "ORG/NAME"}
# Those of them where it is a file or folder.
PLACES = ("imagefolder", "parquet", "webdataset")

__getattr__ = lazy_attributes(
    __name__,
    {
        "entry": ("Dataset", "DatasetEntry", "load_dataset"),
        "images": ("EncodedImages", "ResidentImages", "decode_image"),
        "loader": ("Batch", "Loader"),
        "workers": ("Workers",),
    },
)


def check_dataset(name: str) -> None:
    """Raise UserError unless `name` is a dataset (with what it needs after a colon); opens no file."""
    kind, colon, argument = name.partition(":")
    DATASETS.check(kind)
    if kind in ARGUMENTS and not argument:
        raise UserError(f"dataset '{name}' needs a place: {kind}:{ARGUMENTS[kind]}")
    if kind not in ARGUMENTS and colon:
        raise UserError(f"dataset '{name}': '{kind}' takes nothing after a colon; did you mean '{kind}'?")
