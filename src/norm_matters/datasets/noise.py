"""Noise with labels: for benchmarks, where nothing should depend on files."""

from typing import TYPE_CHECKING

import torch

from norm_matters.core.seeding import generator
from norm_matters.datasets.entry import DatasetEntry, Source
from norm_matters.datasets.images import ResidentImages

if TYPE_CHECKING:
    from norm_matters.core.config import DataConfig

CLASSES = 10


def read_noise(data: "DataConfig", argument: str) -> Source:
    """2,048 + 512 images of 3x32x32 bytes, uniformly random and the same in every run."""
    return Source(
        train=_noise("train", 2048),
        val=_noise("test", 512),
        classes=tuple(map(str, range(CLASSES))),
        pad=4,
        epochs=1,
    )


def _noise(part: str, count: int) -> ResidentImages:
    pixels = torch.randint(256, (count, 3, 32, 32), generator=generator("noise", part), dtype=torch.uint8)
    return ResidentImages(pixels, torch.arange(count).remainder(CLASSES).numpy(), title=f"random {part}")


RANDOM = DatasetEntry(read_noise)
