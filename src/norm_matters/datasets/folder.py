"""Folders of images, one per class: a user's own, and ImageNet."""

import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.fetch import data_folder, missing
from norm_matters.datasets.images import EncodedImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

ENDINGS = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff")
# Folders that hold the images to evaluate on, the first that exists; and what to call them.
VAL_NAMES = {"val": "validation", "validation": "validation", "test": "test"}
# A line of Kaggle's list of ImageNet's classes: "n01440764 tench, Tinca tinca".
IMAGENET_NAMES = "LOC_synset_mapping.txt"


def read_imagefolder(data: "DataConfig", argument: str) -> Source:
    """Read DIR/train/CLASS/* with DIR/val|validation|test/CLASS/*, or DIR/CLASS/* alone, which gets a holdout.

    Args:
        argument: DIR; relative to `data.dir` where that is given.
    """
    root = Path(data.dir or "").expanduser() / Path(argument).expanduser()
    if not root.is_dir():
        raise UserError(f"dataset 'imagefolder:{argument}': {root} is no folder")
    if not (root / "train").is_dir():
        train, classes = scan(root)
        return Source(train=train, val=None, classes=classes)
    val = next((name for name in VAL_NAMES if (root / name).is_dir()), None)
    return read_parts(root, val)


def read_parts(root: Path, val: str | None, *, epochs: int = 30) -> Source:
    """Read ROOT/train and the folder `val` beside it, which must have the same classes."""
    train, classes = scan(root / "train")
    if val is None:
        return Source(train=train, val=None, classes=classes, epochs=epochs)
    images, val_classes = scan(root / val)
    if val_classes != classes:
        lacking = {"train": set(val_classes) - set(classes), val: set(classes) - set(val_classes)}
        facts = "; ".join(f"{part} lacks {_some(names)}" for part, names in lacking.items() if names)
        raise UserError(f"{root}: the classes of train and {val} differ: {facts}")
    return Source(train=train, val=images, classes=classes, val_name=VAL_NAMES[val], epochs=epochs)


def scan(root: Path) -> tuple[EncodedImages, tuple[str, ...]]:
    """List the images below each folder in `root`: its name is their class.

    Hidden files and files without an image's ending are passed over.

    Raises:
        UserError: for no class, a single class, or a class without images.
    """
    classes = tuple(sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not _hidden(entry.name)))
    if not classes:
        raise UserError(f"{root} has no folders; there should be one per class")
    if len(classes) == 1:
        raise UserError(f"{root} has one class only ('{classes[0]}'); training needs two or more")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = [os.path.relpath(path, root) for path in _images(root / name)]
        if not found:
            raise UserError(f"{root / name} has no images ({', '.join(ENDINGS)})")
        names += found
        labels += [label] * len(found)
    return EncodedImages(names, np.array(labels), root=root), classes


def _images(folder: Path) -> list[str]:
    return sorted(
        os.path.join(where, file)
        for where, _, files in os.walk(folder)
        for file in files
        if file.lower().endswith(ENDINGS) and not _hidden(file)
    )


def _hidden(name: str) -> bool:
    return name.startswith(".")


def _some(names: set[str]) -> str:
    shown = sorted(names)
    return ", ".join(f"'{name}'" for name in shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else "")


def read_imagenet(data: "DataConfig", argument: str) -> Source:
    """Read `imagenet/{train,val}/CLASS/*` in the data folder, or the same in the folder of `--data-dir` itself.

    Classes have the names in `LOC_synset_mapping.txt` where that file is beside them, else their folders'.
    """
    base = data_folder(data)
    root = base if (base / "train").is_dir() else base / "imagenet"
    for part in ("train", "val"):
        if not (root / part).is_dir():
            raise missing(root / part, fetched=False)
    source = read_parts(root, "val", epochs=90)
    names = _imagenet_names(root / IMAGENET_NAMES)
    return replace(source, classes=tuple(names.get(folder, folder) for folder in source.classes))


def _imagenet_names(path: Path) -> dict[str, str]:
    """Folder of a class -> its names; empty where the list is missing."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        return {}
    return {folder: names for folder, _, names in (line.partition(" ") for line in lines)}


IMAGEFOLDER = DatasetEntry(read_imagefolder)
IMAGENET = DatasetEntry(read_imagenet)
