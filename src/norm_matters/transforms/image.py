"""Transforms of single images, PIL in and PIL or pixels out, for images that differ in size."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from norm_matters.core.seeding import derive_seed, uniform
from norm_matters.transforms.preprocessing import Preprocessing

# Streams of random numbers from 8 on: four per attempt at a crop (0 to 7 belong to the batch transforms).
FIRST_STREAM, ATTEMPTS = 8, 10
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MAX_RATIO = 8


def inception_crop(image: Image.Image, size: int, *, seed: int, epoch: int, index: int) -> Image.Image:
    """A random part of the image, resized to `size` x `size` pixels.

    The part has 8% to 100% of the area and a ratio of sides of 3:4 to 4:3 (uniform in its logarithm); after ten
    tries that do not fit into the image, the largest centred part of an allowed ratio is taken. Source: Szegedy et
    al., Going deeper with convolutions (2015).

    Args:
        index: of the image in its dataset; the draws depend on (seed, epoch, index) alone.
    """
    box = _random_box(image.size, seed=seed, epoch=epoch, index=index)
    return image.resize((size, size), Image.Resampling.BILINEAR, box=box)


def _random_box(size: tuple[int, int], *, seed: int, epoch: int, index: int) -> tuple[int, int, int, int]:
    width, height = size
    for attempt in range(ATTEMPTS):
        first = FIRST_STREAM + 4 * attempt
        area_draw, ratio_draw, left_draw, top_draw = (
            float(uniform(seed=seed, epoch=epoch, indices=np.array([index]), stream=first + s)[0]) for s in range(4)
        )
        area = width * height * (AREA[0] + (AREA[1] - AREA[0]) * area_draw)
        ratio = RATIO[0] * (RATIO[1] / RATIO[0]) ** ratio_draw
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(left_draw * (width - w + 1)), int(top_draw * (height - h + 1))
            return left, top, left + w, top + h
    w = max(1, min(width, round(height * RATIO[1])))
    h = max(1, min(height, round(width / RATIO[0])))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def centre_crop(image: Image.Image, size: int, resize: int) -> Image.Image:
    """Resize the shorter side to `resize` pixels, then cut out the central `size` x `size` pixels."""
    width, height = image.size
    shorter = min(width, height)
    if max(width, height) > MAX_RATIO * shorter:
        # What is cut off here is never in the centre; resized, a strip of a few pixels' width would fill the memory.
        image = _centre(image, min(width, MAX_RATIO * shorter), min(height, MAX_RATIO * shorter))
        width, height = image.size
    # The longer side is cut short rather than rounded, so that pretrained networks see what torchvision showed them.
    width, height = width * resize // shorter, height * resize // shorter
    return _centre(image.resize((width, height), Image.Resampling.BILINEAR), size, size)


def _centre(image: Image.Image, width: int, height: int) -> Image.Image:
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def to_pixels(image: Image.Image) -> Tensor:
    """The bytes of an RGB or gray image: uint8 (C, H, W)."""
    pixels = torch.from_numpy(np.array(image, dtype=np.uint8))
    return pixels.unsqueeze(0) if pixels.ndim == 2 else pixels.permute(2, 0, 1).contiguous()


def training_pixels(image: Image.Image, preprocessing: Preprocessing, *, seed: int, epoch: int, index: int) -> Tensor:
    """An image on its way into a training batch: uint8 (C, S, S), S the input size; the batch transforms follow."""
    if preprocessing.crop != "inception":
        return evaluation_pixels(image, preprocessing)
    return to_pixels(inception_crop(image, preprocessing.input_size, seed=seed, epoch=epoch, index=index))


def evaluation_pixels(image: Image.Image, preprocessing: Preprocessing) -> Tensor:
    """An image as evaluation and prediction see it: uint8 (C, S, S), S the input size; `normalise` follows."""
    return to_pixels(centre_crop(image, preprocessing.input_size, preprocessing.resize))


@contextmanager
def seeded(*, seed: int, epoch: int, index: int) -> Iterator[None]:
    """Let code draw from Python's, numpy's and torch's global streams, seeded by (seed, epoch, index).

    Their states are as before afterwards. Only torch's CPU stream is touched: `torch.manual_seed` would
    move the accelerator's too, and dropout with it.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    value = derive_seed(seed, "input_transform", epoch, index)
    random.seed(value)
    np.random.seed(value % 2**32)
    torch.default_generator.manual_seed(value)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def apply_own(
    transform: Callable[[Image.Image], Tensor], image: Image.Image, *, seed: int, epoch: int, index: int
) -> Tensor:
    """Run a user's own transform on one image, seeded; float32 (C, H, W).

    Raises:
        ValueError: where it returns anything but a tensor of three dimensions.
    """
    with seeded(seed=seed, epoch=epoch, index=index):
        result = transform(image)
    if not isinstance(result, Tensor) or result.ndim != 3:
        shape = f" of shape {tuple(result.shape)}" if isinstance(result, Tensor) else ""
        raise ValueError(f"it returned a {type(result).__name__}{shape}; a tensor (channels, height, width) is needed")
    return result.float()
