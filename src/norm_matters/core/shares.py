"""How a batch is divided: into the chunks whose gradients are added, and each chunk among the ranks."""

import numpy as np


def chunk_sizes(images: int, chunks: int) -> list[int]:
    """Images in each chunk: as many as fit evenly, the rest in the last, as `torch.chunk` divides them."""
    size = -(-images // chunks)
    return [min(size, images - start) for start in range(0, images, size)]


def share_sizes(images: int, chunks: int, *, rank: int, world: int) -> list[int]:
    """Images that a rank gets of each chunk; they differ by one at most, the first ranks have more."""
    return [len(range(rank, size, world)) for size in chunk_sizes(images, chunks)]


def share(batch: np.ndarray, chunks: int, *, rank: int, world: int) -> np.ndarray:
    """A rank's share of a batch: consecutive images of each chunk, one chunk after the other.

    Args:
        batch: numbers of images (N,), of the whole batch.
    """
    ends = np.cumsum(chunk_sizes(len(batch), chunks))[:-1]
    return np.concatenate([np.array_split(chunk, world)[rank] for chunk in np.split(batch, ends)])
