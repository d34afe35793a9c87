"""Transforms of whole batches of pixels, on whatever device they are.

Their random draws depend on (seed, epoch, index of the image) alone, and are made on the CPU, so every device and
every batch size sees the same crops and flips.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from norm_matters.core.seeding import uniform
from norm_matters.transforms.preprocessing import Preprocessing

# Which of an image's random numbers each draw takes; streams 8 and up belong to `image.inception_crop`.
STREAM_TOP, STREAM_LEFT, STREAM_FLIP = 0, 1, 2


def pad_crop(pixels: Tensor, *, pad: int, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
    """Pad with zeros on each side and crop back to the old size, at a random place per image.

    Args:
        pixels: (N, C, H, W), any dtype.
        pad: pixels per side; every of the (2 pad + 1)^2 places is equally likely.
        indices: (N,) index of each image in its dataset.

    Returns:
        A new tensor of the same shape and dtype.
    """
    _, _, height, width = pixels.shape
    draws = (uniform(seed=seed, epoch=epoch, indices=indices, stream=s) for s in (STREAM_TOP, STREAM_LEFT))
    top, left = (torch.from_numpy((draw * (2 * pad + 1)).astype(np.int64)).to(pixels.device) for draw in draws)
    # A view of every possible crop, (N, C, 2 pad + 1, 2 pad + 1, H, W): picking one per image is a single gather.
    crops = F.pad(pixels, (pad, pad, pad, pad)).unfold(2, height, 1).unfold(3, width, 1)
    return crops[torch.arange(len(pixels), device=pixels.device), :, top, left]


def flip(pixels: Tensor, *, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
    """Mirror each image left to right with probability 1/2.

    Args:
        pixels: (N, C, H, W), any dtype.
        indices: (N,) index of each image in its dataset.

    Returns:
        A new tensor of the same shape and dtype.
    """
    draws = uniform(seed=seed, epoch=epoch, indices=indices, stream=STREAM_FLIP)
    mirrored = torch.from_numpy(np.flatnonzero(draws < 0.5)).to(pixels.device)
    result = pixels.clone()
    result[mirrored] = pixels[mirrored].flip(-1)
    return result


def normalise(pixels: Tensor, preprocessing: Preprocessing, memory_format: torch.memory_format) -> Tensor:
    """Bytes to numbers of mean 0 and standard deviation 1 over the training images.

    Args:
        pixels: uint8 (N, C, H, W), 0 to 255.
        memory_format: of the result.

    Returns:
        float32 (N, C, H, W): `(pixels / 255 - mean) / std` per channel.
    """
    mean, std = (
        torch.tensor(values, dtype=torch.float32, device=pixels.device).mul_(255).view(1, -1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    # The layout comes last: torch's broadcasting over contiguous planes is several times as fast.
    return pixels.float().sub_(mean).div_(std).contiguous(memory_format=memory_format)


def augment(pixels: Tensor, preprocessing: Preprocessing, *, seed: int, epoch: int, indices: np.ndarray) -> Tensor:
    """The batch transforms that `preprocessing` asks for in training: pad-crop, flip.

    Args:
        pixels: uint8 (N, C, H, W).
        indices: (N,) index of each image in its dataset.

    Returns:
        uint8 (N, C, H, W).
    """
    if preprocessing.crop == "pad" and preprocessing.pad:
        pixels = pad_crop(pixels, pad=preprocessing.pad, seed=seed, epoch=epoch, indices=indices)
    if preprocessing.flip:
        pixels = flip(pixels, seed=seed, epoch=epoch, indices=indices)
    return pixels
