"""From a name to images, labels and everything about them that a run has to know and to record."""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.nn.functional as F

from norm_matters.core.errors import UserError
from norm_matters.core.seeding import derive_seed
from norm_matters.datasets import DATASETS, check_dataset
from norm_matters.datasets.images import Images, ResidentImages
from norm_matters.transforms.preprocessing import Preprocessing

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

# Mean and deviation of ImageNet's pixels, in general use for photographs that are not counted one by one.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
ENCODED_SIZE = 224
DEFAULT_HOLDOUT = 0.1
CHUNK = 256
MAX_CLASSES = 1_000_000


@dataclass(frozen=True)
class Source:
    """What a reader finds.

    Attributes:
        val: None where the set has no part of its own for that; then a holdout is taken from `train`.
        val_name: what `val` is ("test", "validation").
        flip: whether a mirrored image is still of its class.
        pad: pixels of padding before a random crop, in training on images held in memory.
        epochs: a sensible length of training.
    """

    train: Images
    val: Images | None
    classes: tuple[str, ...]
    val_name: str = "test"
    flip: bool = True
    pad: int = 0
    epochs: int = 30


@dataclass(frozen=True)
class DatasetEntry:
    """How a dataset is read.

    Attributes:
        read: takes the configuration and what follows the colon in the name ("" where nothing does).
        read_encoded: the same, but leaves encoded what `read` decodes beforehand; None where that is nothing.
    """

    read: "Callable[[DataConfig, str], Source]"
    read_encoded: "Callable[[DataConfig, str], Source] | None" = None


@dataclass(frozen=True)
class Dataset:
    """Images to train on and to evaluate on, with their facts.

    Attributes:
        name: as configured ("digits", "imagefolder:photos").
        val_name: what `val` is, for the record ("test", "validation", "holdout 10% of train").
        classes: name of each class, by label.
        channels: 3 (RGB) or 1 (gray).
        size: side in pixels of images held in memory, None for encoded ones.
        mean: per channel, of training pixels in [0, 1].
        std: per channel, of training pixels in [0, 1].
        fingerprint: JSON-able facts that change when the data do.
        flip: whether training mirrors images.
        pad: padding before a random crop, in pixels.
        epochs: a sensible length of training.
    """

    name: str
    train: Images
    val: Images
    val_name: str
    classes: tuple[str, ...]
    channels: int
    size: int | None
    mean: tuple[float, ...]
    std: tuple[float, ...]
    fingerprint: dict[str, Any]
    flip: bool
    pad: int
    epochs: int

    def preprocessing(
        self,
        *,
        crop: Literal["pad", "inception"],
        input_size: int | None = None,
        cutout: int = 0,
        draft: bool = True,
    ) -> Preprocessing:
        """The transforms for a network that sees this dataset.

        Args:
            crop: what the network's family trains with; images held in memory are padded and cropped in any case.
            input_size: side in pixels for encoded images, default 224; images held in memory have theirs.
            cutout: side in pixels of the square that training sets to the mean in each image; 0 for none.
            draft: whether training may decode JPEGs at a fraction of their size.

        Raises:
            UserError: for a square that is larger than the images.
        """
        size = self.size or input_size or ENCODED_SIZE
        if cutout > size:
            raise UserError(f"data.cutout: value {cutout} is not valid; it takes a whole number from 0 to {size} here")
        inception = crop == "inception" and self.size is None
        pad = self.pad if self.size else size // 8
        return Preprocessing(
            channels=self.channels,
            input_size=size,
            mean=self.mean,
            std=self.std,
            crop="inception" if inception else "pad" if pad else "none",
            pad=0 if inception else pad,
            flip=self.flip,
            resize=round(size * 256 / 224) if inception else size,
            cutout=cutout,
            draft=draft and self.size is None,
        )


def load_dataset(data: "DataConfig", *, seed: int = 0) -> Dataset:
    """Read the dataset that the configuration names.

    Args:
        seed: which images a holdout takes; no part of any other split.

    Raises:
        UserError: for an unknown name, and for files that are missing, damaged or contradict each other.
    """
    check_dataset(data.name)
    kind, _, argument = data.name.partition(":")
    with files_of(data.name):
        source = DATASETS.get(kind).read(data, argument)
    train, val, val_name = _split(source, data.holdout, seed)
    check_labels(data.name, source.classes, train, val)
    pad, mean, std = source.pad, IMAGENET_MEAN, IMAGENET_STD
    if isinstance(train, ResidentImages) and isinstance(val, ResidentImages):
        if data.input_size:
            pad = round(pad * data.input_size / train.pixels.shape[-1])
            train, val = _resize(train, data.input_size, data.name), _resize(val, data.input_size, data.name)
        mean, std = _moments(train)
    return Dataset(
        name=data.name,
        train=train,
        val=val,
        val_name=val_name,
        classes=source.classes,
        channels=len(mean),
        size=train.pixels.shape[-1] if isinstance(train, ResidentImages) else None,
        mean=mean,
        std=std,
        fingerprint=_fingerprint(data.name, source.classes, train, val, val_name),
        flip=source.flip,
        pad=pad,
        epochs=source.epochs,
    )


@contextmanager
def files_of(name: str) -> Iterator[None]:
    """Inside, a file or folder that the system refuses is a UserError that names it, or else the dataset."""
    try:
        yield
    except OSError as error:
        place, reason = error.filename or f"dataset '{name}'", error.strerror or " ".join(str(error).split())
        raise UserError(f"{place}: {reason}") from None


def stratified_split(labels: np.ndarray, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Divide images so that every class gives the same share, at least one image and never all of them.

    Args:
        labels: (N,) class of each image.
        share: of the second part, in (0, 1).

    Returns:
        The numbers of the images of the first and of the second part, each ascending.

    Raises:
        UserError: where a class has a single image.
    """
    order = np.random.default_rng(derive_seed(seed, "holdout")).permutation(len(labels))
    second = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        members = order[labels[order] == label]
        if len(members) < 2:
            raise UserError(f"data.holdout: class {label} has {len(members)} image; a holdout needs two of each class")
        second[members[: min(max(1, round(share * len(members))), len(members) - 1)]] = True
    return np.flatnonzero(~second), np.flatnonzero(second)


def numbered_classes(highest: int) -> tuple[str, ...]:
    """Names of classes that have none: the numbers up to the highest label.

    A hostile label must not fill the memory with names: from `MAX_CLASSES` on it is out of range.
    """
    return tuple(map(str, range(min(highest + 1, MAX_CLASSES))))


def _split(source: Source, holdout: float | None, seed: int) -> tuple[Images, Images, str]:
    if holdout is None and source.val is not None:
        return source.train, source.val, source.val_name
    share = holdout or DEFAULT_HOLDOUT
    first, second = stratified_split(source.train.labels, share, seed)
    return source.train.subset(first), source.train.subset(second), f"holdout {100 * share:g}% of train"


def check_labels(name: str, classes: tuple[str, ...], *parts: Images) -> None:
    """Raise UserError for a part without images, a label that is no class's, and fewer than two classes.

    Args:
        name: of the dataset, for messages.
    """
    for part in parts:
        if not len(part):
            raise UserError(f"dataset '{name}': a part of it has no images")
        wrong = np.flatnonzero((part.labels < 0) | (part.labels >= len(classes)))
        if len(wrong):
            label = part.labels[wrong[0]]
            raise UserError(
                f"{part.name(int(wrong[0]))}: label {label} is out of range; there are {len(classes)} classes"
            )
    if len(classes) < 2:
        raise UserError(f"dataset '{name}' has {len(classes)} class; training needs two or more")


def _resize(images: ResidentImages, size: int, name: str) -> ResidentImages:
    count, channels = images.pixels.shape[:2]
    needed = count * channels * size * size
    if needed > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2:
        raise UserError(f"data.input_size: {size}: the images of '{name}' would take {needed / 1e9:.0f} GB of memory")
    pixels = torch.empty(count, channels, size, size, dtype=torch.uint8)
    for start in range(0, count, CHUNK):
        part = images.pixels[start : start + CHUNK]
        pixels[start : start + CHUNK] = F.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return ResidentImages(pixels, images.labels, title=images.title)


def _moments(images: ResidentImages) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation per channel of pixels in [0, 1], to four digits."""
    channels, height, width = images.pixels.shape[1:]
    # Bytes and their squares are added up exactly: in float32 down a column of at most 256 of them, which is several
    # times as fast as float64 throughout, and then in float64.
    dtype = torch.float32 if height <= 256 else torch.float64
    sums = torch.zeros(2, width * channels, dtype=torch.float64)
    for part in images.pixels.split(CHUNK):
        rows = part.permute(0, 2, 3, 1).reshape(-1, height, width * channels).to(dtype)
        for power in sums:
            power += rows.sum(1).sum(0, dtype=torch.float64)
            rows.square_()
    total, squares = sums.view(2, width, channels).sum(1)
    count = images.pixels.numel() / channels
    mean = total / count
    std = (squares / count - mean.square()).clamp(min=1e-12).sqrt()
    # A set of one colour has no deviation to divide by.
    std = torch.where(std < 1, 255.0, std)
    return tuple(round(v, 4) for v in (mean / 255).tolist()), tuple(round(v, 4) for v in (std / 255).tolist())


def explain_change(before: Any, now: Mapping[str, Any]) -> str:
    """How two fingerprints of what should be the same data differ, in words.

    Args:
        before, now: see `Dataset.fingerprint`; the first was read from a file.
    """
    facts = []
    before = before if isinstance(before, Mapping) else {}
    for part in ("train", "val"):
        old, new = before.get(part), now[part]
        count = old.get("images") if isinstance(old, Mapping) else None
        if count != new["images"]:
            facts.append(f"its {part} part has {new['images']} images instead of {count!r:.20}")
        elif old != new:
            facts.append(f"its {part} part has as many images, of other names, sizes, labels or contents")
    if before.get("classes") != now["classes"]:
        facts.append(f"it has {now['classes']} classes instead of {before.get('classes')!r:.20}")
    return "; ".join(facts) or "it has another name"


def _fingerprint(name: str, classes: tuple[str, ...], train: Images, val: Images, val_name: str) -> dict[str, Any]:
    return {
        "name": name,
        "classes": len(classes),
        "train": {"images": len(train), "sha256": train.digest()},
        "val": {"images": len(val), "sha256": val.digest(), "is": val_name},
    }
