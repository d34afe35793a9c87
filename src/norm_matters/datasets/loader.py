"""Batches for the network, the same whatever the number of workers.

The order of an epoch is a function of (seed, epoch), what happens to an image one of (seed, epoch, index), so a batch
is one of (seed, epoch, indices). Nothing here draws from the global random streams, so evaluating, or reading ahead,
changes nothing.

Small images lie on the device as bytes, and a batch is picked and transformed there; see `datasets.reading` for those
that have to be decoded.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from norm_matters.core.shares import share
from norm_matters.datasets.decoding import Transform
from norm_matters.datasets.images import Images, ResidentImages
from norm_matters.datasets.order import epoch_order
from norm_matters.datasets.reading import Reading
from norm_matters.datasets.workers import Workers, count_workers
from norm_matters.transforms.batch import BatchPlan, network_input, plan_batches
from norm_matters.transforms.preprocessing import Preprocessing

# Images held in memory move to an accelerator when they take no more than this share of what it has free.
DEVICE_SHARE = 1 / 4
# Images in a batch of evaluation at most. The batch of training is that of all ranks: too much for one.
EVALUATION_BATCH = 256


class Batch(NamedTuple):
    """One batch.

    Attributes:
        images: float32 (B, C, H, W), on the device.
        labels: int64 (B,), on the device.
        indices: int64 (B,), number of each image in its dataset.
    """

    images: Tensor
    labels: Tensor
    indices: np.ndarray


class Loader:
    """Feeds images to training (shuffled, augmented) or to evaluation (in order, each once).

    In training the last, incomplete batch of an epoch is left out: a batch norm would see a handful of images there.
    Its images come in another place in the next epoch's order. A set smaller than a batch is one batch.

    Args:
        images: what to feed.
        preprocessing: our transforms.
        batch_size: images per batch.
        train: shuffle, augment and drop the incomplete batch.
        seed: of order and augmentation.
        workers: processes that read ahead; 0 reads in this one, "auto" chooses (see `count_workers`). Results do not
            depend on it. Images held in memory need none, and get none, unless a transform of the user's takes them.
        device: where batches end up.
        transform: a user's own, PIL to tensor (C, H, W); replaces ours altogether.
        memory_format: of the images.
        rank: which of the `world` processes this is that train together. In training each gets its share of every
            batch, so that together they see the batches that one process sees; in evaluation each gets whole batches,
            in turns, so that every batch is what it is in one process.
        chunks: how many chunks a training batch is taken in; each rank gets its share of every chunk.
        to_skip: how many training images may be unreadable; others of their classes stand in for them.

    Attributes:
        workers: how many there are.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        workers: Workers = 0,
        device: str | torch.device = "cpu",
        transform: Transform | None = None,
        memory_format: torch.memory_format = torch.channels_last,
        rank: int = 0,
        world: int = 1,
        chunks: int = 1,
        to_skip: int = 0,
    ) -> None:
        assert 0 <= rank < world
        self.images = images
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.device = torch.device(device)
        self.transform = transform
        self.memory_format = memory_format
        self.rank = rank
        self.world = world
        self.chunks = chunks
        self._labels: Tensor | None = None
        self._pixels: Tensor | None = None
        self._reading: Reading | None = None
        self.workers = 0
        if transform is not None or not isinstance(images, ResidentImages):
            self.workers = count_workers(self.device) if workers == "auto" else workers
            self._reading = Reading(
                images,
                preprocessing,
                train=train,
                seed=seed,
                workers=self.workers,
                transform=transform,
                to_skip=to_skip if train else 0,
                # In training the other ranks would wait in vain for this one's share of the step.
                interruptible=not train or world == 1,
            )

    def __len__(self) -> int:
        """Batches per epoch, of this rank."""
        if self.train:
            return max(1, len(self.images) // self.batch_size)
        return len(range(self.rank, -(-len(self.images) // self.batch_size), self.world))

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of all images in the order of that epoch; int64 (N,)."""
        if not self.train:
            return np.arange(len(self.images))
        return epoch_order(len(self.images), self.images.layout, seed=self.seed, epoch=epoch)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """This rank's batches of an epoch, from its batch `start` on.

        Raises:
            UserError: naming the image, where one cannot be read; and the worker, where one died or got stuck.
            StopRequestedError: the process is asked to stop, and waits for a batch.
        """
        chunks = self._chunks(epoch)[start:]
        augmented = self.preprocessing if self.train and self.transform is None else None
        plans = plan_batches(chunks, augmented, seed=self.seed, epoch=epoch, device=self.device)
        if self._labels is None:
            self._labels = torch.tensor(self.images.labels).to(self.device)
        read = self._reading.batches(epoch, chunks) if self._reading else None
        source = map(self._pick, plans, chunks) if read is None else map(self._sent, read)
        try:
            for chunk, plan, pixels in zip(chunks, plans, source, strict=True):
                yield Batch(self._finish(pixels, plan), self._labels.index_select(0, plan.indices), chunk)
        finally:
            if read is not None:
                read.close()

    @property
    def unreadable(self) -> dict[str, str]:
        """Name of each image that could not be read so far, and for which another stood in -> why; of this rank."""
        return dict(self._reading.unreadable) if self._reading else {}

    def _chunks(self, epoch: int) -> list[np.ndarray]:
        """The numbers of the images in each of this rank's batches."""
        order, size = self.order(epoch), self.batch_size
        if self.train:
            batches = (order[i * size : (i + 1) * size] for i in range(len(self)))
            return [share(batch, self.chunks, rank=self.rank, world=self.world) for batch in batches]
        return [order[i : i + size] for i in range(self.rank * size, len(order), self.world * size)]

    def close(self) -> None:
        """End the workers, if there are any; the next epoch starts new ones."""
        if self._reading:
            self._reading.close()

    def _pick(self, plan: BatchPlan, chunk: np.ndarray) -> Tensor:
        """The pixels of a batch of images held in memory; uint8 (B, H, W, C) on the device."""
        assert isinstance(self.images, ResidentImages)
        if self._pixels is None:
            pixels = self.images.pixels.permute(0, 2, 3, 1)
            self._pixels = pixels.to(self.device) if has_room(self.device, pixels.nbytes) else pixels
        if self._pixels.device == plan.indices.device:
            return self._pixels.index_select(0, plan.indices)
        return self._sent(self._pixels.index_select(0, torch.from_numpy(chunk)))

    def _sent(self, values: Tensor) -> Tensor:
        """What lies in ordinary memory, on its way to the device: nothing waits for it to arrive."""
        if self.device.type == "cuda":
            values = values.pin_memory()
        return values.to(self.device, non_blocking=self.device.type == "cuda")

    def _finish(self, pixels: Tensor, plan: BatchPlan) -> Tensor:
        if self.transform is not None:
            return pixels.contiguous(memory_format=self.memory_format)
        return network_input(pixels.permute(0, 3, 1, 2), self.preprocessing, plan, self.memory_format)


def evaluation_batch_size(batch_size: int) -> int:
    """Images per batch of evaluation, in a run that trains on `batch_size`, whatever the number of ranks."""
    return min(batch_size, EVALUATION_BATCH)


def has_room(device: torch.device, needed: int) -> bool:
    """Whether images of so many bytes are to be kept on the device: on a GPU, in a quarter of what is free."""
    return device.type != "cuda" or needed <= DEVICE_SHARE * torch.cuda.mem_get_info(device)[0]
