"""The processes that decode images: how many there are, and how they are started and end."""

import errno
import gc
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Literal

import torch

from norm_matters.core import stopping
from norm_matters.core.errors import UserError

# More workers than this wait for the disk, or for the main process.
MAX_WORKERS = 16
# On a CPU, the cores that train for each worker that reads.
CORES_PER_WORKER = 4

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


def ignored() -> frozenset[int]:
    """The signals that are for the main process alone, though they may reach all processes of the run."""
    return stopping.listened_to() | {signal.SIGINT}


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
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ignored())
    main = threading.current_thread() is threading.main_thread()
    deaths = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        if main and signal.getsignal(signal.SIGCHLD) != deaths:
            _death_handler = signal.signal(signal.SIGCHLD, deaths)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hearing_deaths() -> AbstractContextManager[None]:
    """Inside, the end of a worker is an error in the main thread."""
    return _on_death(_death_handler)


def ignoring_deaths() -> AbstractContextManager[None]:
    """Inside, workers may end."""
    return _on_death(signal.SIG_DFL)


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
