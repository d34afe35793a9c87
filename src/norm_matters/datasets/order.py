"""The order of an epoch: a function of seed and epoch, kind to the disk where images lie together in large files."""

from typing import NamedTuple

import numpy as np
import torch

from norm_matters.core.seeding import generator

# Images that are shuffled among each other, where not all are.
WINDOW = 16_384


class Layout(NamedTuple):
    """How images lie in large files.

    Attributes:
        blocks: int64 (B,), so many consecutive images each, which are best read close after one another.
        window: so many images are shuffled among each other; what is read within it should fit into memory.
    """

    blocks: np.ndarray
    window: int = WINDOW


def epoch_order(count: int, layout: Layout | None, *, seed: int, epoch: int) -> np.ndarray:
    """The numbers 0 to `count` - 1, each once, in an order that depends on the arguments alone.

    Without a layout, or with no more images than its window, every order is equally likely. Otherwise the blocks are
    put in a random order, and each image moves back by up to `window` places, drawn for itself; what moves past the end
    comes first. So the images of a block are met within a window, among those of all blocks that begin in it: a
    window's length over the mean length of a block, plus one, at the start of an epoch as well as later. A window's
    worth of blocks at the end is met at the start too.

    Returns:
        int64 (count,).
    """
    draws = generator(seed, "order", epoch)
    if layout is None or count <= layout.window:
        return torch.randperm(count, generator=draws).numpy()
    assert layout.blocks.sum() == count
    order = torch.randperm(len(layout.blocks), generator=draws).numpy()
    lengths = layout.blocks[order]
    places = np.cumsum(lengths) - lengths
    first_images = (np.cumsum(layout.blocks) - layout.blocks)[order]
    images = np.repeat(first_images - places, lengths) + np.arange(count)
    moves = torch.rand(count, generator=draws, dtype=torch.float64).numpy() * layout.window
    return images[np.argsort((np.repeat(places, lengths) + moves) % count, kind="stable")]


def block_lengths(blocks: np.ndarray) -> np.ndarray:
    """Lengths of the runs of equal numbers; int64.

    Args:
        blocks: (N,) number of the block that each image is in.
    """
    if not len(blocks):
        return np.zeros(0, dtype=np.int64)
    starts = np.flatnonzero(np.concatenate([[True], blocks[1:] != blocks[:-1]]))
    return np.diff(np.concatenate([starts, [len(blocks)]]))
