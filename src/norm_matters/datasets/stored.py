"""Encoded images in large files, read one by one where they lie, whatever the number of images."""

import hashlib
import os
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, final

import numpy as np
from PIL import Image

from norm_matters.core.errors import UserError
from norm_matters.datasets.images import Images, decode_reduced
from norm_matters.datasets.names import Names
from norm_matters.datasets.order import WINDOW, Layout, block_lengths
from norm_matters.datasets.shards import Shard

# Below so many bytes, images are read in any order: they stay in the system's cache.
LARGE = 2**30
# Bytes that are best read at a time: a disk that has to seek spends a tenth of its time on it.
BLOCK_BYTES = 2**24
# Files that a process keeps open; and blocks that it remembers to have announced to the system.
MAX_OPEN = 128
MAX_ANNOUNCED = 1024


class Store(ABC):
    """Encoded images, numbered from 0.

    Attributes:
        blocks: int (N,), ascending: images with the same number are best read together; None where it does not matter.
        window: see `order.Layout`.
    """

    blocks: np.ndarray | None
    window: int

    @abstractmethod
    def read(self, number: int) -> bytes:
        """The bytes of one image.

        Raises:
            UserError: naming it, where it cannot be read.
        """

    @abstractmethod
    def name(self, number: int) -> str:
        """What to call an image in messages."""

    @abstractmethod
    def digest(self) -> str:
        """SHA-256 of what is known of the files without reading them; the same wherever they lie."""


@final
class StoredImages(Images):
    """Images of a store, decoded when asked for.

    Args:
        labels: (N,) class of each image.
        numbers: of each image in the store; all of them by default.
        channels: 3 (RGB) or 1 (gray).
    """

    def __init__(
        self, store: Store, labels: np.ndarray, *, numbers: np.ndarray | None = None, channels: int = 3
    ) -> None:
        self.store = store
        self.labels = np.asarray(labels, dtype=np.int64)
        self.numbers = np.arange(len(labels)) if numbers is None else np.asarray(numbers, dtype=np.int64)
        assert len(self.labels) == len(self.numbers)
        self.channels = channels
        if store.blocks is not None:
            self.layout = Layout(block_lengths(store.blocks[self.numbers]), store.window)

    def image(self, index: int) -> Image.Image:
        """Decode one image, mode RGB or L; UserError naming it where that fails."""
        return self.reduced(index, lambda width, height: 1)[0]

    def reduced(self, index: int, reduction: Callable[[int, int], int]) -> tuple[Image.Image, tuple[int, int]]:
        """Decode one image, a JPEG at a fraction of its size where that is enough; see `decode_reduced`."""
        return decode_reduced(self.content(index), self.channels, reduction, name=self.name(index))

    def content(self, index: int) -> bytes:
        """The bytes as they are stored."""
        return self.store.read(int(self.numbers[index]))

    def name(self, index: int) -> str:
        """What the store calls it: the file, and the place in it."""
        return self.store.name(int(self.numbers[index]))

    def subset(self, indices: np.ndarray) -> "StoredImages":
        """The images of those numbers, in that order."""
        return StoredImages(self.store, self.labels[indices], numbers=self.numbers[indices], channels=self.channels)

    def digest(self) -> str:
        """SHA-256 of the labels, of which images these are, and of what the store knows of its files."""
        digest = hashlib.sha256(self.labels.tobytes())
        digest.update(self.numbers.tobytes())
        digest.update(self.store.digest().encode())
        return digest.hexdigest()


@final
class ByteRanges(Store):
    """Images whose bytes lie in files as they are: tar archives, parquet files without compression.

    Files are opened where they are read, and read by position: processes that inherit them do not disturb each other.

    Args:
        files: in the order of the images.
        counts: (F,), images in each.
        offsets: int64 (N,), first byte of each image in its file.
        sizes: int64 (N,), bytes of each image.
        keys: what each image is called within its file.
        facts: of the files, for the digest; their names and sizes at least.
    """

    def __init__(
        self,
        files: Sequence[Path],
        counts: np.ndarray,
        offsets: np.ndarray,
        sizes: np.ndarray,
        keys: Names,
        *,
        facts: Sequence[str],
    ) -> None:
        assert len(offsets) == len(sizes) == len(keys) == int(np.sum(counts))
        self.files = files
        self.ends = np.cumsum(counts, dtype=np.int64)
        self.offsets, self.sizes, self.keys, self.facts = offsets, sizes, keys, facts
        self.blocks, self.window = None, WINDOW
        if sizes.sum() >= LARGE:
            # A block is what begins in the same stretch of the same file.
            stretches = offsets // BLOCK_BYTES
            file_numbers = np.repeat(np.arange(len(files)), counts)
            self.blocks = np.cumsum((np.diff(file_numbers, prepend=0) != 0) | (np.diff(stretches, prepend=0) != 0))
        self._open: OrderedDict[int, int] = OrderedDict()
        self._announced: OrderedDict[int, None] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        # Where workers are not forked, they open files of their own.
        return {**self.__dict__, "_open": OrderedDict(), "_announced": OrderedDict()}

    def __del__(self) -> None:
        while getattr(self, "_open", None):
            with suppress(OSError):
                os.close(self._open.popitem()[1])

    def read(self, number: int) -> bytes:
        """The bytes of one image."""
        file = int(np.searchsorted(self.ends, number, side="right"))
        offset, size = int(self.offsets[number]), int(self.sizes[number])
        try:
            descriptor = self._descriptor(file)
            if self.blocks is not None:
                self._announce(descriptor, number)
            content = os.pread(descriptor, size, offset)
        except OSError as error:
            raise UserError(f"{self.name(number)}: {self.files[file]} cannot be read: {error.strerror}") from None
        if len(content) < size:
            raise UserError(f"{self.name(number)}: the file is cut short: it has {len(content)} of {size} bytes there")
        return content

    def name(self, number: int) -> str:
        """The file and the name within it."""
        file = int(np.searchsorted(self.ends, number, side="right"))
        return f"{self.files[file]}, {self.keys[number]}"

    def digest(self) -> str:
        """SHA-256 of the facts, and of where each image lies, how long it is and what it is called."""
        digest = hashlib.sha256("\0".join(self.facts).encode(errors="surrogateescape"))
        for array in (self.ends, self.offsets, self.sizes, self.keys.ends):
            digest.update(np.ascontiguousarray(array, dtype=np.int64).tobytes())
        digest.update(self.keys.blob)
        return digest.hexdigest()

    def _descriptor(self, file: int) -> int:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        while len(self._open) >= MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        self._open[file] = os.open(self.files[file], os.O_RDONLY | os.O_CLOEXEC)
        return self._open[file]

    def _announce(self, descriptor: int, number: int) -> None:
        """Tell the system that the whole block will be wanted: it reads it in one go, while images are decoded."""
        assert self.blocks is not None
        block = int(self.blocks[number])
        if block in self._announced:
            self._announced.move_to_end(block)
            return
        if len(self._announced) >= MAX_ANNOUNCED:
            self._announced.popitem(last=False)
        self._announced[block] = None
        first, end = np.searchsorted(self.blocks, [block, block + 1])
        start, stop = int(self.offsets[first]), int(self.offsets[end - 1] + self.sizes[end - 1])
        with suppress(AttributeError, OSError):  # not everywhere
            os.posix_fadvise(descriptor, start, stop - start, os.POSIX_FADV_WILLNEED)


def stored_images(
    files: Sequence[Path], shards: Sequence[Shard], facts: Sequence[str], *, labels: np.ndarray | None = None
) -> StoredImages:
    """The images whose bytes lie in files as the tables say.

    Args:
        facts: of the files, for the digest.
        labels: in place of those in the tables.
    """
    store = ByteRanges(
        files,
        np.array([len(shard.sizes) for shard in shards]),
        np.concatenate([shard.offsets for shard in shards]),
        np.concatenate([shard.sizes for shard in shards]),
        Names.joined([shard.keys for shard in shards]),
        facts=facts,
    )
    return StoredImages(store, np.concatenate([shard.labels for shard in shards]) if labels is None else labels)
