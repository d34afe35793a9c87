"""Random numbers as functions of names and counters, so that no result depends on who drew first."""

import hashlib
import random
from functools import lru_cache

import numpy as np
import torch

# Constants of splitmix64: what the counter is multiplied by, and the rounds of its finalizer.
_STEP, _MASK = 0x9E3779B97F4A7C15, 2**64 - 1
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part and on nothing else, e.g. `derive_seed(seed, "order", epoch)`."""
    digest = hashlib.blake2b("\x1f".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def generator(*parts: int | str) -> torch.Generator:
    """A CPU generator of its own, seeded by `derive_seed(*parts)`."""
    return torch.Generator().manual_seed(derive_seed(*parts))


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's global streams (initial weights, dropout)."""
    random.seed(derive_seed(seed, "python"))
    np.random.seed(derive_seed(seed, "numpy") % 2**32)
    torch.manual_seed(derive_seed(seed, "torch"))


def uniform(*, seed: int, epoch: int, indices: np.ndarray, stream: int) -> np.ndarray:
    """Uniform draws in [0, 1) that depend on (seed, epoch, index of the image, stream) alone.

    A counter-based generator (the finalizer of splitmix64 over the mixed counters): results do not depend on
    the batch an image is in, on the order, or on the number of workers.

    Args:
        indices: image indices in the dataset, any shape, non-negative.
        stream: which of an image's draws this is (0, 1, ...).

    Returns:
        float64 array of the shape of `indices`.
    """
    with np.errstate(over="ignore"):
        z = np.asarray(indices).astype(np.uint64) * np.uint64(_STEP) + np.uint64(_key(seed, epoch, stream))
        for shift, factor in _ROUNDS:
            z = (z ^ (z >> np.uint64(shift))) * np.uint64(factor)
        z = z ^ (z >> np.uint64(31))
    return (z >> np.uint64(11)).astype(np.float64) / 2.0**53


def uniform_of(*, seed: int, epoch: int, index: int, stream: int) -> float:
    """The draw that `uniform` makes for one image, in a tenth of the time."""
    z = (index * _STEP + _key(seed, epoch, stream)) & _MASK
    for shift, factor in _ROUNDS:
        z = ((z ^ (z >> shift)) * factor) & _MASK
    return ((z ^ (z >> 31)) >> 11) / 2.0**53


@lru_cache(maxsize=256)
def _key(seed: int, epoch: int, stream: int) -> int:
    return derive_seed(seed, "augmentation", epoch, stream)
