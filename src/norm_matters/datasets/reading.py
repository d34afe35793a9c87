"""Images that have to be decoded: read ahead by worker processes, or in this one.

What a worker returns are bytes in arrays, which travel through a pipe: tensors would go through /dev/shm, which is
small in containers, and need the worker's help to be opened, for which torch waits without a limit.
"""

import ctypes
import errno
import gc
import multiprocessing
import os
import signal
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, MutableSequence, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info
from torch.utils.data import Dataset as MapDataset

from norm_matters.core import stopping
from norm_matters.core.errors import LostWorkerError, UserError
from norm_matters.core.faults import fault_point
from norm_matters.core.seeding import generator
from norm_matters.datasets.images import Images
from norm_matters.datasets.standing_in import UnreadableImageError, check_unreadable, stand_ins
from norm_matters.transforms.image import apply_own, evaluation_pixels, training_pixels
from norm_matters.transforms.preprocessing import Preprocessing

# Seconds without a batch after which workers count as stuck: without a limit, one stopped worker hangs a run for ever.
WORKER_TIMEOUT = 300
# Seconds between two looks, while nothing comes, at whether the process is asked to stop.
LOOK_EVERY = 0.5
# More workers than this wait for the disk, or for the main process.
MAX_WORKERS = 16
# On a CPU, the cores that train for each worker that reads.
CORES_PER_WORKER = 4

Transform = Callable[[Image.Image], Tensor]
Workers = int | Literal["auto"]


def count_workers(device: torch.device, cores: int | None = None) -> int:
    """How many workers read ahead for a network on that device.

    With a GPU all cores but one, at most `MAX_WORKERS`. On a CPU decoding is a small part of the work, and a core that
    decodes is one less to train: a worker for every four cores, at least one; with a single core none, for there it
    could only take turns with the training.

    Args:
        cores: that this process may use; found out when not given.
    """
    cores = cores or available_cores()
    wanted = max(1, cores // CORES_PER_WORKER) if device.type == "cpu" else cores - 1
    return min(wanted, cores - 1, MAX_WORKERS)


def available_cores() -> int:
    """The cores that this process may run on."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not everywhere
        return os.cpu_count() or 1


def check_shared_memory(workers: int) -> None:
    """Raise UserError where /dev/shm has no room for the locks of so many workers, before anything waits for them.

    Batches need none of it; but each lock takes a page there, and containers may have next to nothing.
    """
    try:
        # As many as the two loaders of a run have: an event and a queue, and a queue for each worker.
        locks = [multiprocessing.Lock() for _ in range(2 * (8 + 3 * workers))]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise UserError(
            f"data.workers: {workers}: there is no room in /dev/shm for the locks of workers; give it a megabyte "
            "(docker run --shm-size=1m), or take data.workers=0"
        ) from None
    del locks


class Reading:
    """Reads the images of batches, in order.

    Args:
        images: what to read.
        preprocessing: our transforms.
        train: augment.
        seed: of the augmentation.
        workers: processes that read ahead; 0 reads in this one.
        transform: a user's own; replaces ours.
        to_skip: how many training images may be unreadable; others stand in for them.
        interruptible: a process that is asked to stop (see `core.stopping`) waits for no batch.

    Attributes:
        unreadable: name of each image that could not be read, and for which another stood in -> why.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        *,
        train: bool,
        seed: int,
        workers: int,
        transform: Transform | None,
        to_skip: int = 0,
        interruptible: bool = False,
    ) -> None:
        assert train or not to_skip, "evaluation takes every image"
        self.workers = workers
        self.images = images
        self.to_skip = to_skip
        self.interruptible = interruptible
        self._patience = WORKER_TIMEOUT
        self.unreadable: dict[str, str] = {}
        if workers:
            check_shared_memory(workers)
        # Which image each worker is on, -1 for none: written there, read here when one does not answer any more.
        self._places: Any = multiprocessing.RawArray(ctypes.c_int64, [-1] * workers) if workers else [-1]
        self._work: list[_Item] = []
        reader = _Reader(
            images,
            preprocessing,
            self._places,
            train=train,
            seed=seed,
            transform=transform,
            to_skip=to_skip,
            interruptible=interruptible,
        )
        with warnings.catch_warnings():
            # More workers than cores is the user's choice.
            warnings.filterwarnings("ignore", message="This DataLoader will create")
            self._loader = DataLoader(
                reader,
                batch_size=None,
                sampler=self._work,
                num_workers=workers,
                collate_fn=_identity,
                timeout=LOOK_EVERY if workers else 0,
                worker_init_fn=partial(start_worker, ignored=_ignored()),
                # Of its own: otherwise each epoch takes a number from the global stream.
                generator=generator(seed, "workers"),
                persistent_workers=workers > 0,
            )

    def batches(self, epoch: int, chunks: Sequence[np.ndarray]) -> Generator[Tensor, None, None]:
        """What the images of each chunk look like in that epoch.

        Yields:
            uint8 (B, H, W, C); where the transform is the user's own, float32 (B, C, H, W).

        Raises:
            UserError: naming the image, where one cannot be read; and the worker, where one died or got stuck.
            StopRequestedError: the process is asked to stop, and waits.
        """
        self._work[:] = [(epoch, chunk) for chunk in chunks]
        try:
            with start_of_workers():
                results = iter(self._loader)
            for number in range(len(chunks)):
                result = self._wait(results, number)
                if isinstance(result, _Failure):
                    raise UserError(*result.problems)
                if isinstance(result, _Mended):
                    self.unreadable |= result.unreadable
                    check_unreadable(self.unreadable, self.to_skip)
                    result = result.batch
                yield torch.from_numpy(result)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the workers, if there are any; the next epoch starts new ones.

        After an error above all: a worker that is stopped would keep this process from ever ending.
        """
        iterator: Any = self._loader._iterator
        if iterator is None:
            return
        # Another DataLoader in this process may have had its end heard all the time.
        with _on_death(signal.SIG_DFL):
            for worker in iterator._workers:
                worker.kill()
            # A worker may have been killed while it held the lock of the event that says that all is done, and whoever
            # sets the event would wait for that lock. Nobody is left who looks at it.
            iterator._workers_done_event = threading.Event()
            iterator._shutdown_workers()
        self._loader._iterator = None

    def _wait(self, results: Iterator[Any], number: int) -> "np.ndarray | _Mended | _Failure":
        """The batch of that number in the epoch."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with _on_death(_death_handler):
                    # Whoever died while nobody waited.
                    if self._dead():
                        raise RuntimeError("DataLoader worker exited")
                    return next(results)
            except RuntimeError as error:
                # torch's words for a worker that was killed, and for one that hangs; others come from a transform.
                if not str(error).startswith("DataLoader ") or not self.workers:
                    raise
                if not str(error).startswith("DataLoader timed out") or time.monotonic() > deadline:
                    raise LostWorkerError(f"data.workers: {self.workers}: {self._explain(number)}") from error
                _stop_if_asked(self.interruptible)

    def _dead(self) -> list[int]:
        return [n for n, worker in enumerate(self._processes()) if worker.exitcode is not None]

    def _processes(self) -> list[Any]:
        iterator: Any = self._loader._iterator
        return iterator._workers if iterator is not None else []

    def _explain(self, number: int) -> str:
        """Which worker it is that gave no batch of that number, why, and what it was doing."""
        dead = self._dead()
        # torch deals the batches of an epoch out in turns.
        worker = dead[0] if dead else number % self.workers
        process = self._processes()[worker]
        place = self._places[worker]
        image = f" with {self.images.name(place)}" if place >= 0 else ""
        who = f"worker {worker} (process {process.pid})"
        if dead:
            code = process.exitcode
            end = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"exited with status {code}"
            return f"{who} {end} while it was busy{image}; try fewer workers, which need less memory"
        return f"{who} timed out: no batch for {self._patience:g} seconds while it was busy{image}"


_Item = tuple[int, np.ndarray]


@dataclass(frozen=True)
class _Failure:
    """A UserError on its way out of a worker: torch would wrap the exception itself in a page of traceback."""

    problems: tuple[str, ...]


@dataclass(frozen=True)
class _Mended:
    """A batch in which others stand in for images that could not be read: name -> why."""

    batch: np.ndarray
    unreadable: dict[str, str]


class _Reader(MapDataset[Any]):
    """Reads the images of one batch; nothing it returns depends on what it did before, or in which process."""

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        places: MutableSequence[int],
        *,
        train: bool,
        seed: int,
        transform: Transform | None,
        to_skip: int,
        interruptible: bool,
    ) -> None:
        self.images = images
        self.preprocessing = preprocessing
        self.places = places
        self.train = train
        self.seed = seed
        self.transform = transform
        self.to_skip = to_skip
        self.interruptible = interruptible

    def __getitem__(self, item: _Item) -> np.ndarray | _Mended | _Failure:
        epoch, indices = item
        info = get_worker_info()
        worker = info.id if info else 0
        unreadable: dict[str, str] = {}
        try:
            tensors = []
            for index in map(int, indices):
                if info is None:
                    _stop_if_asked(self.interruptible)
                self.places[worker] = index
                tensors.append(self._readable(epoch, index, unreadable))
            batch = self._stack(tensors)
            return _Mended(batch, unreadable) if unreadable else batch
        except UserError as error:
            return _Failure(error.problems)
        finally:
            self.places[worker] = -1

    def _readable(self, epoch: int, index: int, unreadable: dict[str, str]) -> Tensor:
        """The image, or the first that can be read of those that may stand in for it; what cannot is noted."""
        try:
            return self._tensor(epoch, index, index)
        except UnreadableImageError as error:
            if not self.to_skip:
                raise
            unreadable[self.images.name(index)] = str(error)
            for other in stand_ins(self.images.labels, index, seed=self.seed, epoch=epoch, count=self.to_skip):
                try:
                    return self._tensor(epoch, index, other)
                except UnreadableImageError as another:
                    unreadable[self.images.name(other)] = str(another)
            check_unreadable(unreadable, self.to_skip)
            raise

    def _tensor(self, epoch: int, index: int, source: int) -> Tensor:
        """An image as the network sees it, or another one treated as if it were that."""
        if self.transform is not None:
            return self._own(self._image(source)[0], self.transform, epoch, index)
        if not self.train:
            return evaluation_pixels(self._image(source)[0], self.preprocessing)

        def read(reduction: Callable[[int, int], int]) -> tuple[Image.Image, tuple[int, int]]:
            return self._image(source, reduction if self.preprocessing.draft else None)

        return training_pixels(read, self.preprocessing, seed=self.seed, epoch=epoch, index=index)

    def _image(
        self, index: int, reduction: Callable[[int, int], int] | None = None
    ) -> tuple[Image.Image, tuple[int, int]]:
        """An image and its full width and height."""
        try:
            fault_point("data", step=index)
            if reduction is not None:
                return self.images.reduced(index, reduction)
            image = self.images.image(index)
        except UserError as error:
            raise UnreadableImageError(*error.problems) from None
        except OSError as error:
            raise UnreadableImageError(f"{self.images.name(index)}: it cannot be read: {error.strerror}") from None
        return image, image.size

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

    def _stack(self, tensors: list[Tensor]) -> np.ndarray:
        if self.transform is None:
            return torch.stack([tensor.permute(1, 2, 0) for tensor in tensors]).numpy()
        shapes = {tuple(tensor.shape) for tensor in tensors}
        if len(shapes) > 1:
            shown = ", ".join(map(str, sorted(shapes)[:3]))
            raise UserError(f"input_transform returns images of different shapes ({shown}); a batch needs one")
        return torch.stack(tensors).numpy()


def _identity(value: Any) -> Any:
    return value


def start_worker(worker: int, *, ignored: Iterable[int] = (signal.SIGINT,)) -> None:
    """Make a new process ready to read images.

    Args:
        worker: its number.
        ignored: signals that it leaves to the run.
    """
    # Where a server process starts the workers, they do not inherit the blocked signals.
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    # To look for garbage in what was inherited would write to every page of it, and each worker would have a copy.
    gc.freeze()


def _ignored() -> frozenset[int]:
    """The signals that are for the main process alone, though they may reach all processes of the run."""
    return stopping.listened_to() | {signal.SIGINT}


def _stop_if_asked(interruptible: bool) -> None:
    if interruptible and stopping.requested():
        raise stopping.StopRequestedError


# What torch does at a worker's end: it raises wherever the main thread happens to be, in the middle of a training step
# too. So it is heard only while somebody waits for a batch.
_death_handler: Any = None


@contextmanager
def start_of_workers() -> Iterator[None]:
    """Inside, workers may be started.

    Ctrl-C reaches every process of the run, and only the main one answers it; so do the signals that ask a run to stop.
    Workers inherit them blocked, so they ignore them from their first moment on; here they are delivered when the
    workers have been started.
    """
    global _death_handler
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _ignored())
    main = threading.current_thread() is threading.main_thread()
    deaths = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if main and signal.getsignal(signal.SIGCHLD) != deaths:
            _death_handler = signal.signal(signal.SIGCHLD, deaths)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextmanager
def _on_death(handler: Any) -> Iterator[None]:
    """Inside, this happens at a worker's end; with None, or in a thread, which cannot choose, what happens outside."""
    if handler is None or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)
