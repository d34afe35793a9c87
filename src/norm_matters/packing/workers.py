"""Work that is dealt out to processes, and comes back in order."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

import torch
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as MapDataset

from norm_matters.core.errors import UserError
from norm_matters.datasets.workers import Workers, available_cores, start_of_workers, start_worker

Result = TypeVar("Result")


def in_order(task: Callable[[int], Result], count: int, workers: Workers) -> Iterator[Result]:
    """`task(0)`, `task(1)` to `task(count - 1)`, worked on by processes; what comes out does not depend on how many.

    Args:
        task: its results must be light to send; it returns the user's mistakes, for what it raises ends all.
        workers: 0 works in this process, "auto" takes every core.

    Raises:
        UserError: a worker died.
    """
    processes = min(count, available_cores() if workers == "auto" else workers)
    if processes <= (1 if workers == "auto" else 0):
        yield from map(task, range(count))
        return
    with warnings.catch_warnings():
        # More workers than cores is the user's choice.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            _Tasks(task, count),
            batch_size=None,
            num_workers=processes,
            collate_fn=_identity,
            worker_init_fn=start_worker,
            prefetch_factor=4,
            generator=torch.Generator(),
        )
        with start_of_workers():
            results = iter(loader)
    try:
        yield from results
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise UserError(f"--workers: a worker died ({' '.join(str(error).split())}); try fewer") from None


class _Tasks(MapDataset[Any], Generic[Result]):
    def __init__(self, task: Callable[[int], Result], count: int) -> None:
        self.task, self.count = task, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> Result:
        if not 0 <= number < self.count:
            raise IndexError(number)
        return self.task(number)


def _identity(value: Any) -> Any:
    return value
