"""Transforms of whole batches of pixels, on whatever device they are.

Their random draws depend on (seed, epoch, index of the image) alone, and are made on the CPU, so every device and
every batch size sees the same crops and flips. They are made for an epoch at once and moved in one piece: no batch
makes the CPU wait for the device.

Pixels are indexed (N, C, H, W) and lie in memory as (N, H, W, C): there a crop's row is one piece for all channels.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from norm_matters.core.seeding import uniform
from norm_matters.transforms.preprocessing import Preprocessing

# Which of an image's random numbers each draw takes; streams 8 and up belong to `image.inception_crop`.
STREAM_TOP, STREAM_LEFT, STREAM_FLIP, STREAM_CUT_ROW, STREAM_CUT_COLUMN = range(5)


class BatchPlan(NamedTuple):
    """Which images make a batch, and what happens to each; what is not asked for is None.

    Attributes:
        indices: int64 (N,), number of each image in its dataset.
        top, left: int64 (N,), where the crop begins in the padded image, from 0 to twice the padding.
        mirrored: int64 (M,), the places in the batch whose image is mirrored, ascending.
        cut_top, cut_left: int64 (N,), where the square that is cut out begins; part of it may lie outside.
    """

    indices: Tensor
    top: Tensor | None = None
    left: Tensor | None = None
    mirrored: Tensor | None = None
    cut_top: Tensor | None = None
    cut_left: Tensor | None = None


def plan_batches(
    chunks: Sequence[np.ndarray],
    preprocessing: Preprocessing | None,
    *,
    seed: int,
    epoch: int,
    device: torch.device | str = "cpu",
) -> list[BatchPlan]:
    """Draw for many batches at once what happens to their images.

    Args:
        chunks: for each batch the numbers of its images in the dataset.
        preprocessing: the transforms that draw; None for evaluation, where nothing is drawn.
        device: where the plans end up.
    """
    if not chunks:
        return []
    indices = np.concatenate(chunks)
    ends = np.cumsum([len(chunk) for chunk in chunks])[:-1]

    def integers(stream: int, count: int, offset: int = 0) -> list[np.ndarray]:
        draws = uniform(seed=seed, epoch=epoch, indices=indices, stream=stream)
        return np.split((draws * count).astype(np.int64) - offset, ends)

    columns: dict[str, Sequence[np.ndarray]] = {"indices": np.split(indices, ends)}
    if preprocessing is not None:
        if preprocessing.crop == "pad" and preprocessing.pad:
            places = 2 * preprocessing.pad + 1
            columns |= {"top": integers(STREAM_TOP, places), "left": integers(STREAM_LEFT, places)}
        if preprocessing.flip:
            flips = uniform(seed=seed, epoch=epoch, indices=indices, stream=STREAM_FLIP) < 0.5
            columns["mirrored"] = [np.flatnonzero(part) for part in np.split(flips, ends)]
        if size := preprocessing.cutout:
            centre = preprocessing.input_size, size // 2
            columns |= {
                "cut_top": integers(STREAM_CUT_ROW, *centre),
                "cut_left": integers(STREAM_CUT_COLUMN, *centre),
            }
    tensors = _move([torch.from_numpy(part) for column in columns.values() for part in column], torch.device(device))
    count = len(chunks)
    by_name = {name: tensors[i * count : (i + 1) * count] for i, name in enumerate(columns)}
    return [BatchPlan(**{name: parts[batch] for name, parts in by_name.items()}) for batch in range(count)]


def _move(tensors: list[Tensor], device: torch.device) -> list[Tensor]:
    """The tensors on the device, in one transfer."""
    if device.type == "cpu":
        return tensors
    return list(torch.cat(tensors).to(device).split([len(tensor) for tensor in tensors]))


def pad_crop(pixels: Tensor, *, pad: int, top: Tensor, left: Tensor) -> Tensor:
    """Pad with zeros on each side and crop back to the old size, at a place per image.

    Args:
        pixels: (N, C, H, W), any dtype.
        pad: pixels per side, at least 1.
        top, left: int64 (N,), first row and column of each crop in the padded image, from 0 to `2 * pad`.

    Returns:
        A new tensor of the same shape and dtype, channels_last.
    """
    nhwc = pixels.permute(0, 2, 3, 1)
    count, height, width, channels = nhwc.shape
    padded = nhwc.new_zeros(count, height + 2 * pad, width + 2 * pad, channels)
    padded[:, pad:-pad, pad:-pad] = nhwc
    image, line, pixel, _ = padded.stride()
    # A view with every piece of memory that is as long as a row of the result, wherever it begins: picking the rows
    # is a single gather of whole pieces.
    length = width * channels
    pieces = padded.as_strided((padded.numel() - length + 1, length), (1, 1))
    first = torch.arange(0, count * image, image, device=pixels.device) + top * line + left * pixel
    rows = first[:, None] + torch.arange(0, height * line, line, device=pixels.device)
    return pieces.index_select(0, rows.view(-1)).view(count, height, width, channels).permute(0, 3, 1, 2)


def flip(pixels: Tensor, *, mirrored: Tensor) -> Tensor:
    """Mirror some images left to right.

    Args:
        pixels: (N, C, H, W), any dtype.
        mirrored: int64 (M,), which ones.

    Returns:
        A new tensor of the same shape and dtype, channels_last.
    """
    nhwc = pixels.permute(0, 2, 3, 1)
    return nhwc.index_copy(0, mirrored, nhwc.index_select(0, mirrored).flip(2)).permute(0, 3, 1, 2)


def cutout(images: Tensor, *, size: int, top: Tensor, left: Tensor) -> Tensor:
    """Set a square in each image to 0, which is the mean once they are normalised.

    Source: DeVries and Taylor, Improved regularization of convolutional neural networks with cutout (2017).

    Args:
        images: (N, C, H, W); changed in place.
        size: side of the square in pixels; what lies outside the image is clipped.
        top, left: int64 (N,), first row and column of each square; may be negative.

    Returns:
        `images`.
    """
    inside = [
        (place >= first[:, None]) & (place < first[:, None] + size)
        for length, first in zip(images.shape[2:], (top, left), strict=True)
        for place in (torch.arange(length, device=images.device),)
    ]
    return images.masked_fill_((inside[0][:, :, None] & inside[1][:, None, :])[:, None], 0)


def normalise(pixels: Tensor, preprocessing: Preprocessing, memory_format: torch.memory_format) -> Tensor:
    """Bytes to numbers of mean 0 and standard deviation 1 over the training images.

    Args:
        pixels: uint8 (N, C, H, W), 0 to 255.
        memory_format: of the result.

    Returns:
        float32 (N, C, H, W): `(pixels / 255 - mean) / std` per channel.
    """
    count, channels, height, width = pixels.shape
    if memory_format != torch.channels_last:
        mean, std = _moments(preprocessing.mean, preprocessing.std, pixels.device)
        return pixels.float().contiguous().sub_(mean.view(-1, 1, 1)).div_(std.view(-1, 1, 1))
    # Against whole rows, not against three numbers at a time, which would be several times as slow.
    mean, std = _moments(preprocessing.mean * width, preprocessing.std * width, pixels.device)
    rows = pixels.permute(0, 2, 3, 1).reshape(-1, width * channels)
    return rows.float().sub_(mean).div_(std).view(count, height, width, channels).permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _moments(mean: tuple[float, ...], std: tuple[float, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Mean and deviation of bytes, on the device: made anew, each batch would wait for two transfers."""
    first, second = (torch.tensor(values, dtype=torch.float32).mul_(255).to(device) for values in (mean, std))
    return first, second


def augment(pixels: Tensor, preprocessing: Preprocessing, plan: BatchPlan) -> Tensor:
    """Crop and mirror as the plan says; see `pad_crop` and `flip`.

    Args:
        pixels: uint8 (N, C, H, W).
        plan: of these images.

    Returns:
        uint8 (N, C, H, W).
    """
    if plan.top is not None and plan.left is not None:
        pixels = pad_crop(pixels, pad=preprocessing.pad, top=plan.top, left=plan.left)
    if plan.mirrored is not None:
        pixels = flip(pixels, mirrored=plan.mirrored)
    return pixels


def network_input(
    pixels: Tensor,
    preprocessing: Preprocessing,
    plan: BatchPlan,
    memory_format: torch.memory_format = torch.channels_last,
) -> Tensor:
    """From the pixels of a batch to what the network sees: crop, flip, normalise, cut out.

    Args:
        pixels: uint8 (N, C, H, W).
        plan: of these images.
        memory_format: of the result.

    Returns:
        float32 (N, C, H, W).
    """
    images = normalise(augment(pixels, preprocessing, plan), preprocessing, memory_format)
    if plan.cut_top is not None and plan.cut_left is not None:
        cutout(images, size=preprocessing.cutout, top=plan.cut_top, left=plan.cut_left)
    return images
