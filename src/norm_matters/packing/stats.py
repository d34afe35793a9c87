"""What is in a dataset: images per class, sizes, broken files, mean and deviation, duplicates."""

import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, NamedTuple, final

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.images import Images, decode_image
from norm_matters.datasets.workers import Workers
from norm_matters.packing.source import PackSource
from norm_matters.packing.workers import in_order

# Images that a process looks at in one go.
CHUNK = 32
# The sides that divide the histogram, in pixels: doubled, with one step between.
SIDES = (32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)


class _Seen(NamedTuple):
    """What was found out about one image; `problem` is empty where it could be decoded."""

    number: int
    size: int
    width: int
    height: int
    mean: tuple[float, ...]
    mean_square: tuple[float, ...]
    digest: bytes
    problem: str


@dataclass
class PartStats:
    """Of one part of a dataset.

    Attributes:
        per_class: images of each class.
        bytes: of the encoded images.
        sizes: (width, height) -> how many images; those that can be decoded.
        broken: name of an image, with what is wrong with it.
        mean: per channel, of pixels in [0, 1]; every image counts alike, whatever its size.
        std: per channel, likewise.
    """

    per_class: list[int]
    bytes: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def images(self) -> int:
        """All of them."""
        return sum(self.per_class)

    @property
    def imbalance(self) -> float:
        """Images of the largest class for each of the smallest; infinite where a class has none."""
        return max(self.per_class) / min(self.per_class) if min(self.per_class) else float("inf")


@dataclass(frozen=True)
class DatasetStats:
    """Of a whole dataset.

    Attributes:
        parts: "train" and what it is evaluated on.
        duplicates: names of images with the same bytes, a list for each.
        shared: how many images to evaluate on are in the training part too.
    """

    name: str
    classes: tuple[str, ...]
    parts: dict[str, PartStats]
    duplicates: list[list[str]]
    shared: int

    def to_json(self) -> dict[str, Any]:
        """The same in JSON types."""
        parts = {
            name: {
                "images": part.images,
                "bytes": part.bytes,
                # A list: nobody promises that the names of classes differ.
                "per_class": [
                    {"label": label, "class": self.classes[label], "images": count}
                    for label, count in enumerate(part.per_class)
                ],
                "imbalance": part.imbalance if part.imbalance < float("inf") else None,
                "shorter_side": dict(shorter_sides(part.sizes)),
                "mean": part.mean,
                "std": part.std,
                "broken": part.broken,
            }
            for name, part in self.parts.items()
        }
        return {"name": self.name, "parts": parts, "duplicates": self.duplicates, "shared": self.shared}


def shorter_sides(sizes: Counter[tuple[int, int]]) -> list[tuple[str, int]]:
    """A histogram of the shorter sides, without empty ends: range in pixels, and how many images."""
    counts = [0] * (len(SIDES) + 1)
    for size, count in sizes.items():
        counts[int(np.searchsorted(SIDES, min(size), side="right"))] += count
    names = [f"below {SIDES[0]}", *(f"{low} to {high - 1}" for low, high in pairwise(SIDES))]
    names.append(f"{SIDES[-1]} or more")
    filled = [n for n, count in enumerate(counts) if count]
    return list(zip(names, counts, strict=True))[filled[0] : filled[-1] + 1] if filled else []


def measure_dataset(
    source: PackSource, *, workers: Workers = "auto", advance: Callable[[int], None] = lambda images: None
) -> DatasetStats:
    """Decode every image, and count.

    Args:
        advance: told how many images more are done.

    Raises:
        UserError: a worker died. Broken images are part of the result.
    """
    parts: dict[str, PartStats] = {}
    places: defaultdict[bytes, list[tuple[str, int]]] = defaultdict(list)
    for name, images in source.parts.items():
        part = parts[name] = PartStats(np.bincount(images.labels, minlength=len(source.classes)).tolist())
        looking = _Looking(images)
        sums = np.zeros((2, 3))
        decoded = 0
        for chunk in in_order(looking, len(looking), workers):
            for seen in chunk:
                part.bytes += seen.size
                if seen.digest:
                    places[seen.digest].append((name, seen.number))
                if seen.problem:
                    part.broken.append(seen.problem)
                    continue
                part.sizes[seen.width, seen.height] += 1
                sums += [seen.mean, seen.mean_square]
                decoded += 1
            advance(len(chunk))
        if decoded:
            mean, mean_square = sums / decoded
            part.mean = tuple(mean.round(4).tolist())
            part.std = tuple(np.sqrt((mean_square - mean**2).clip(min=0)).round(4).tolist())
    several = [found for found in places.values() if len(found) > 1]
    return DatasetStats(
        name=source.name,
        classes=source.classes,
        parts=parts,
        duplicates=[[source.parts[part].name(index) for part, index in found] for found in several],
        shared=sum(part != "train" for found in several if found[0][0] == "train" for part, _ in found),
    )


@final
class _Looking:
    """The task of a worker: looks at the images of one chunk."""

    def __init__(self, images: Images) -> None:
        self.images = images

    def __len__(self) -> int:
        """How many chunks there are."""
        return -(-len(self.images) // CHUNK)

    def __call__(self, chunk: int) -> Sequence[_Seen]:
        """What there is to say of each image of a chunk."""
        start = chunk * CHUNK
        return [self._one(index) for index in range(start, min(start + CHUNK, len(self.images)))]

    def _one(self, index: int) -> _Seen:
        content = digest = b""
        try:
            content = self.images.content(index)
            digest = hashlib.blake2b(content, digest_size=16).digest()
            # Gray images count as RGB.
            image = decode_image(content, 3, name=self.images.name(index))
        except UserError as error:
            problem = "; ".join(error.problems)
            return _Seen(index, len(content), 0, 0, (), (), digest, problem)
        # Levels are counted and then summed: exact, and faster than to square every pixel.
        counts = np.array(image.histogram(), dtype=np.float64).reshape(3, 256) / (image.width * image.height)
        levels = np.arange(256) / 255
        mean, mean_square = counts @ levels, counts @ levels**2
        return _Seen(index, len(content), *image.size, tuple(mean), tuple(mean_square), digest, "")
