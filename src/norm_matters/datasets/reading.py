"""Images that have to be decoded: read ahead by worker processes, or in this one."""

import ctypes
import multiprocessing
import signal
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from norm_matters.core.errors import LostWorkerError, UserError
from norm_matters.core.seeding import generator
from norm_matters.datasets.decoding import Failure, Item, Mended, Reader, Transform, stop_if_asked
from norm_matters.datasets.images import Images
from norm_matters.datasets.standing_in import check_unreadable
from norm_matters.datasets.workers import (
    check_shared_memory,
    hearing_deaths,
    ignored,
    ignoring_deaths,
    start_of_workers,
    start_worker,
)
from norm_matters.transforms.preprocessing import Preprocessing

# Seconds without a batch after which workers count as stuck: without a limit, one stopped worker hangs a run for ever.
WORKER_TIMEOUT = 300
# Seconds between two looks, while nothing comes, at whether the process is asked to stop.
LOOK_EVERY = 0.5


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
        self._work: list[Item] = []
        reader = Reader(
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
                worker_init_fn=partial(start_worker, ignored=ignored()),
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
                if isinstance(result, Failure):
                    raise UserError(*result.problems)
                if isinstance(result, Mended):
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
        with ignoring_deaths():
            for worker in iterator._workers:
                worker.kill()
            # A worker may have been killed while it held the lock of the event that says that all is done, and whoever
            # sets the event would wait for that lock. Nobody is left who looks at it.
            iterator._workers_done_event = threading.Event()
            iterator._shutdown_workers()
        self._loader._iterator = None

    def _wait(self, results: Iterator[Any], number: int) -> "np.ndarray | Mended | Failure":
        """The batch of that number in the epoch."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with hearing_deaths():
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
                stop_if_asked(self.interruptible)

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


def _identity(value: Any) -> Any:
    return value
