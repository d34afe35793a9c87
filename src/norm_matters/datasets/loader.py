"""Batches for the network, the same whatever the number of workers.

The order of an epoch is a function of (seed, epoch), what happens to an image one of (seed, epoch, index). Nothing
here draws from the global random streams, so evaluating, or reading ahead, changes nothing.
"""

import signal
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from norm_matters.core.errors import UserError
from norm_matters.core.seeding import generator
from norm_matters.datasets.images import Images, ResidentImages
from norm_matters.transforms.batch import augment, normalise
from norm_matters.transforms.image import apply_own, evaluation_pixels, training_pixels
from norm_matters.transforms.preprocessing import Preprocessing

# Seconds without a batch after which workers count as stuck: without a limit, one stopped worker hangs a run for ever.
WORKER_TIMEOUT = 300

Transform = Callable[[Image.Image], Tensor]


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
        workers: processes that read ahead; 0 reads in this one. Results do not depend on it.
        device: where batches end up.
        transform: a user's own, PIL to tensor (C, H, W); replaces ours altogether.
        memory_format: of the images.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        *,
        batch_size: int,
        train: bool,
        seed: int,
        workers: int = 0,
        device: str | torch.device = "cpu",
        transform: Transform | None = None,
        memory_format: torch.memory_format = torch.channels_last,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.train = train
        self.seed = seed
        self.workers = workers
        self.device = torch.device(device)
        self.transform = transform
        self.memory_format = memory_format
        self._work: list[_Item] = []
        self._reader = self._make_reader()

    def __len__(self) -> int:
        """Batches per epoch."""
        if self.train:
            return max(1, len(self.images) // self.batch_size)
        return -(-len(self.images) // self.batch_size)

    def order(self, epoch: int) -> np.ndarray:
        """The numbers of all images in the order of that epoch; int64 (N,)."""
        if not self.train:
            return np.arange(len(self.images))
        return torch.randperm(len(self.images), generator=generator(self.seed, "order", epoch)).numpy()

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from batch `start` on.

        Raises:
            UserError: naming the image, where one cannot be read; where a worker died or got stuck.
        """
        order = self.order(epoch)
        chunks = [order[i * self.batch_size : (i + 1) * self.batch_size] for i in range(start, len(self))]
        self._work[:] = [(epoch, chunk) for chunk in chunks]
        try:
            results = self._start()
            for chunk in chunks:
                yield self._finish(next(results), epoch, chunk)
        except BaseException as error:
            self.close()
            # torch's words for a worker that was killed, and for one that hangs.
            if isinstance(error, RuntimeError) and str(error).startswith("DataLoader "):
                reason = str(error).splitlines()[0]
                raise UserError(f"data.workers: {self.workers}: {reason}; try fewer workers") from error
            raise

    def _start(self) -> Iterator[Any]:
        # Ctrl-C reaches every process of the run, and only the main one answers it. Workers inherit the blocked
        # signal, so they ignore it from their first moment on; here it is delivered when they have been started.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            return iter(self._reader)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def close(self) -> None:
        """End the workers, if there are any; the next epoch starts new ones.

        After an error above all: a worker that is stopped would keep this process from ever ending.
        """
        iterator: Any = self._reader._iterator
        if iterator is None:
            return
        # torch answers each worker's end with an exception out of nowhere as long as it counts as running.
        in_main_thread = threading.current_thread() is threading.main_thread()
        handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL) if in_main_thread else None
        for worker in iterator._workers:
            worker.kill()
        iterator._shutdown_workers()
        self._reader._iterator = None
        if in_main_thread:
            signal.signal(signal.SIGCHLD, handler)

    def _finish(self, result: "np.ndarray | _Failure", epoch: int, indices: np.ndarray) -> Batch:
        if isinstance(result, _Failure):
            raise UserError(*result.problems)
        labels = torch.from_numpy(self.images.labels[indices]).to(self.device)
        pixels = torch.from_numpy(result).to(self.device)
        if self.transform is not None:
            return Batch(pixels.contiguous(memory_format=self.memory_format), labels, indices)
        if self.train:
            pixels = augment(pixels, self.preprocessing, seed=self.seed, epoch=epoch, indices=indices)
        return Batch(normalise(pixels, self.preprocessing, self.memory_format), labels, indices)

    def _make_reader(self) -> DataLoader[Any]:
        reader = _Reader(self.images, self.preprocessing, train=self.train, seed=self.seed, transform=self.transform)
        with warnings.catch_warnings():
            # More workers than cores is the user's choice.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            return DataLoader(
                reader,
                batch_size=None,
                sampler=self._work,
                num_workers=self.workers,
                collate_fn=_identity,
                timeout=WORKER_TIMEOUT if self.workers else 0,
                worker_init_fn=_start_worker,
                # Of its own: otherwise each epoch takes a number from the global stream.
                generator=generator(self.seed, "workers"),
                persistent_workers=self.workers > 0,
            )


_Item = tuple[int, np.ndarray]


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker: torch would wrap the exception itself in a page of traceback."""

    problems: tuple[str, ...]


class _Reader(MapDataset[Any]):
    """Reads the images of one batch; stateless, so that it makes no difference which process does it.

    What a worker returns are arrays, which travel through a pipe: tensors would go through /dev/shm, which is small in
    containers, and need the worker's help to be opened, for which torch waits without a limit.
    """

    def __init__(
        self, images: Images, preprocessing: Preprocessing, *, train: bool, seed: int, transform: Transform | None
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.train = train
        self.seed = seed
        self.transform = transform

    def __getitem__(self, item: _Item) -> np.ndarray | _Failure:
        epoch, indices = item
        try:
            if isinstance(self.images, ResidentImages) and self.transform is None:
                return self.images.pixels[torch.from_numpy(indices)].numpy()
            return self._stack([self._tensor(epoch, int(index)) for index in indices]).numpy()
        except UserError as error:
            return _Failure(error.problems)

    def _tensor(self, epoch: int, index: int) -> Tensor:
        image = self.images.image(index)
        if self.transform is not None:
            return self._own(image, self.transform, epoch, index)
        if self.train:
            return training_pixels(image, self.preprocessing, seed=self.seed, epoch=epoch, index=index)
        return evaluation_pixels(image, self.preprocessing)

    def _own(self, image: Image.Image, transform: Transform, epoch: int, index: int) -> Tensor:
        # Evaluation is the same at every epoch, also where a transform draws.
        try:
            return apply_own(transform, image, seed=self.seed, epoch=epoch if self.train else 0, index=index)
        except Exception as error:
            place = traceback.extract_tb(error.__traceback__)[-1]
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise UserError(
                f"input_transform failed on {self.images.name(index)}: {reason} ({place.filename}:{place.lineno})"
            ) from error

    @staticmethod
    def _stack(tensors: list[Tensor]) -> Tensor:
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            shown = ", ".join(map(str, sorted(shapes)[:3]))
            raise UserError(f"input_transform returns images of different shapes ({shown}); a batch needs one")
        return torch.stack(tensors)


def _identity(value: Any) -> Any:
    return value


def _start_worker(worker: int) -> None:
    # Where a server process starts the workers, they do not inherit the blocked signal.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
