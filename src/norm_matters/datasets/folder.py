"""Folders of images, one per class."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.images import EncodedImages
from norm_matters.datasets.listing import ENDINGS, list_images

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

# Folders that hold the images to evaluate on, the first that exists; and what to call them.
VAL_NAMES = {"val": "validation", "validation": "validation", "test": "test"}


def read_imagefolder(data: "DataConfig", argument: str) -> Source:
    """Read DIR/train/CLASS/* with DIR/val|validation|test/CLASS/*, or DIR/CLASS/* alone, which gets a holdout.

    Args:
        argument: DIR; relative to `data.dir` where that is given.
    """
    root = Path(data.dir or "").expanduser() / Path(argument).expanduser()
    if not root.is_dir():
        raise UserError(f"dataset 'imagefolder:{argument}': {root} is no folder")
    home = None if data.links else root
    if not (root / "train").is_dir():
        train, classes = scan(root, home=home)
        return Source(train=train, val=None, classes=classes)
    val = next((name for name in VAL_NAMES if (root / name).is_dir()), None)
    return read_parts(root, val, home=home)


def read_parts(
    root: Path, val: str | None, *, epochs: int = 30, keep: bool = False, home: Path | None = None
) -> Source:
    """Read ROOT/train and the folder `val` beside it, which must have the same classes; see `scan`."""
    train, classes = scan(root / "train", keep=keep, home=home)
    if val is None:
        return Source(train=train, val=None, classes=classes, epochs=epochs)
    images, val_classes = scan(root / val, keep=keep, home=home)
    if val_classes != classes:
        lacking = {"train": set(val_classes) - set(classes), val: set(classes) - set(val_classes)}
        facts = "; ".join(f"{part} lacks {_some(names)}" for part, names in lacking.items() if names)
        raise UserError(f"{root}: the classes of train and {val} differ: {facts}")
    return Source(train=train, val=images, classes=classes, val_name=VAL_NAMES[val], epochs=epochs)


def scan(root: Path, *, keep: bool = False, home: Path | None = None) -> tuple[EncodedImages, tuple[str, ...]]:
    """List the images below each folder in `root`: its name is their class.

    Hidden files and files without an image's ending are passed over.

    Args:
        keep, home: see `list_images`.

    Raises:
        UserError: for no class, a single class, or a class without images.
    """
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name)))
    if not classes:
        raise UserError(f"{root} has no folders; there should be one per class")
    if len(classes) == 1:
        raise UserError(f"{root} has one class only ('{classes[0]}'); training needs two or more")
    names, sizes = list_images(root, keep=keep, home=home)
    numbers = {name: label for label, name in enumerate(classes)}
    # A file in `root` itself has no class.
    labels = np.array(
        [numbers.get(name.partition("/")[0], -1) if "/" in name else -1 for name in names], dtype=np.int64
    )
    counts = np.bincount(labels[labels >= 0], minlength=len(classes))
    if not counts.all():
        raise UserError(f"{root / classes[int(counts.argmin())]} has no images ({', '.join(ENDINGS)})")
    if (labels < 0).any():
        chosen = np.flatnonzero(labels >= 0)
        names, sizes, labels = names.take(chosen), sizes[chosen], labels[chosen]
    return EncodedImages(names, labels, root=root, sizes=sizes), classes


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(f"'{name}'" for name in shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


IMAGEFOLDER = DatasetEntry(read_imagefolder)
