"""Transforms of single images, PIL in and PIL or pixels out, for images that differ in size."""

import math
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from norm_matters.core.seeding import derive_seed, uniform_of
from norm_matters.transforms.preprocessing import Preprocessing

# Streams of random numbers from 8 on: four per attempt at a crop (0 to 7 belong to the batch transforms).
FIRST_STREAM, ATTEMPTS = 8, 10
AREA, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)
MAX_RATIO = 8

Reduction = Callable[[int, int], int]
Read = Callable[[Reduction], tuple[Image.Image, tuple[int, int]]]


def inception_crop(
    image: Image.Image,
    size: int,
    *,
    seed: int,
    epoch: int,
    index: int,
    full_size: tuple[int, int] | None = None,
) -> Tensor:
    """A random part of the image, resized to `size` x `size` pixels.

    The part has 8% to 100% of the area and a ratio of sides of 3:4 to 4:3 (uniform in its logarithm); after ten
    tries that do not fit into the image, the largest centred part of an allowed ratio is taken. Source: Szegedy et
    al., Going deeper with convolutions (2015).

    It is cut out first and then resized, so that nothing around it shows, by torch: what comes out is Pillow's bilinear
    result up to rounding (by at most 3 of 255 levels), in less than half the time.

    Args:
        image: RGB or gray.
        index: of the image in its dataset; the draws depend on (seed, epoch, index) alone.
        full_size: width and height of the image before it was reduced, where it was: the same part is taken, up to a
            pixel of `image`.

    Returns:
        uint8 (C, size, size), channels_last.
    """
    full_size = full_size or image.size
    box = _random_box(full_size, seed=seed, epoch=epoch, index=index)
    part = np.array(image.crop(_in_reduced(box, full_size, image.size)))
    nhwc = torch.from_numpy(part.reshape(1, *part.shape[:2], -1))
    return interpolate(nhwc.permute(0, 3, 1, 2), (size, size), mode="bilinear", antialias=True)[0]


def inception_reduction(width: int, height: int, size: int, *, seed: int, epoch: int, index: int) -> int:
    """How far an image may be reduced (see `reduction`) before `inception_crop` takes its part."""
    left, top, right, bottom = _random_box((width, height), seed=seed, epoch=epoch, index=index)
    return reduction(min(right - left, bottom - top), size)


def reduction(side: int, needed: int) -> int:
    """The largest of 8, 4, 2 and 1 that a side may be divided by and still have `needed` pixels."""
    return next((factor for factor in (8, 4, 2) if side >= factor * needed), 1)


def _in_reduced(
    box: tuple[int, int, int, int], full_size: tuple[int, int], size: tuple[int, int]
) -> tuple[int, int, int, int]:
    """The box in the pixels of an image that was reduced from `full_size` to `size`."""
    starts, lengths = [], []
    for axis in range(2):
        scale = size[axis] / full_size[axis]
        lengths.append(max(1, round((box[axis + 2] - box[axis]) * scale)))
        starts.append(min(round(box[axis] * scale), size[axis] - lengths[axis]))
    return starts[0], starts[1], starts[0] + lengths[0], starts[1] + lengths[1]


def _random_box(size: tuple[int, int], *, seed: int, epoch: int, index: int) -> tuple[int, int, int, int]:
    width, height = size
    for attempt in range(ATTEMPTS):
        first = FIRST_STREAM + 4 * attempt
        area_draw, ratio_draw, left_draw, top_draw = (
            uniform_of(seed=seed, epoch=epoch, index=index, stream=first + s) for s in range(4)
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
    """The bytes of an RGB or gray image: uint8 (C, H, W), channels_last."""
    pixels = np.array(image, dtype=np.uint8)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def training_pixels(read: Read, preprocessing: Preprocessing, *, seed: int, epoch: int, index: int) -> Tensor:
    """An image on its way into a training batch; the batch transforms follow.

    Args:
        read: gives the image, reduced by what a function of its width and height says or less, and its full width
            and height.

    Returns:
        uint8 (C, S, S), S the input size.
    """
    size = preprocessing.input_size
    if preprocessing.crop != "inception":
        image, _ = read(lambda width, height: reduction(min(width, height), preprocessing.resize))
        return evaluation_pixels(image, preprocessing)
    image, full_size = read(partial(inception_reduction, size=size, seed=seed, epoch=epoch, index=index))
    return inception_crop(image, size, seed=seed, epoch=epoch, index=index, full_size=full_size)


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
