"""What is in a shard: where its images lie, their labels and names."""

import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np

from norm_matters.core.errors import UserError
from norm_matters.datasets.kept import pack_arrays, read_kept, unpack_arrays, write_kept
from norm_matters.datasets.names import Names

# Raised by whoever changes what a table says of a shard.
VERSION = "1"
_COLUMNS = ("counts", "offsets", "sizes", "labels", "key_ends", "text")


class Shard(NamedTuple):
    """The images in one file.

    Attributes:
        offsets: int64 (N,), first byte of each image, ascending.
        sizes: int64 (N,), bytes of each.
        labels: int64 (N,).
        keys: what each is called.
    """

    offsets: np.ndarray
    sizes: np.ndarray
    labels: np.ndarray
    keys: Names


def known_shard(file: Path, scan: Callable[[Path], Shard]) -> Shard:
    """What is in a shard, as it was found when the same file was scanned before, or by scanning it.

    Raises:
        UserError: the file is missing, or `scan` says so.
    """
    try:
        facts = file.stat()
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}") from None
    identity = (VERSION, os.path.realpath(file), facts.st_size, facts.st_mtime_ns, facts.st_ino)
    kept = read_kept("shards", *identity)
    if kept is not None:
        with suppress(ValueError):
            return unpack_shards(kept, [facts.st_size])[0]
    shard = scan(file)
    write_kept(pack_shards([shard]), "shards", *identity)
    return shard


def pack_shards(shards: Sequence[Shard]) -> bytes:
    """The bytes of a table of shards."""
    keys, none = Names.joined([shard.keys for shard in shards]), np.zeros(0, dtype=np.int64)
    return pack_arrays(
        {
            "counts": np.array([len(shard.sizes) for shard in shards], dtype=np.int64),
            "offsets": np.concatenate([none, *(shard.offsets for shard in shards)]),
            "sizes": np.concatenate([none, *(shard.sizes for shard in shards)]),
            "labels": np.concatenate([none, *(shard.labels for shard in shards)]),
            "key_ends": keys.ends,
            "text": np.frombuffer(keys.blob, dtype=np.uint8),
        }
    )


def unpack_shards(data: bytes, file_sizes: Sequence[int]) -> list[Shard]:
    """The shards of a table; nothing in it is believed without a look.

    Args:
        file_sizes: bytes of each shard's file.

    Raises:
        ValueError: it is damaged, of other files, or names what lies outside of them.
    """
    counts, offsets, sizes, labels, ends, text = unpack_arrays(data, _COLUMNS)
    if len(counts) != len(file_sizes) or not _within(counts, 0, len(sizes)) or counts.sum() != len(sizes):
        raise ValueError("it is of other files")
    if {len(ends), len(offsets), len(labels)} != {len(sizes)}:
        raise ValueError("its columns differ in length")
    if not _within(ends, 0, len(text)) or (np.diff(ends) < 0).any() or len(text) != (ends[-1] if len(ends) else 0):
        raise ValueError("its names are cut")
    limits = np.repeat(np.array(file_sizes, dtype=np.int64), counts)
    if not _within(offsets, 0, 2**62) or not _within(sizes, 0, 2**62) or (offsets + sizes > limits).any():
        raise ValueError("it names bytes outside of the files")
    keys, shards, start = Names(text.tobytes(), ends), list[Shard](), 0
    for count in counts.tolist():
        rows = slice(start, start + count)
        shards.append(Shard(offsets[rows], sizes[rows], labels[rows], keys[rows]))
        start += count
    return shards


def _within(values: np.ndarray, low: int, high: int) -> bool:
    return values.min(initial=low) >= low and values.max(initial=low) <= high
