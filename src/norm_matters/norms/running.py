"""The running statistics of a network, held back until the step that made them is accepted."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from norm_matters.norms.batchwise import BatchwiseNorm
from norm_matters.norms.query import norms_of


class RunningStatistics:
    """What all norms of a network remember of the batches they saw, torch's own norms included.

    A step that is given up (a loss scale overflow, a loss that is not finite) has already moved the statistics in its
    forward pass: `rollback` returns to what `commit` accepted last.

    Args:
        model: a network whose norms stay the same objects, on the same device.
    """

    def __init__(self, model: nn.Module) -> None:
        self._live = list(_buffers(model))
        self._accepted = [buffer.clone() for buffer in self._live]
        self._rejected = [
            norm.num_batches_rejected
            for _, norm in norms_of(model)
            if isinstance(norm, BatchwiseNorm) and norm.num_batches_rejected is not None
        ]

    def commit(self) -> None:
        """Accept the statistics as they are."""
        _copy(self._live, self._accepted)

    def rollback(self, where: Tensor | None = None) -> None:
        """Return to the statistics that were accepted last.

        Args:
            where: flag (no dimension) on their device; where it is false nothing changes.
        """
        source = self._accepted
        if where is not None:
            source = [torch.where(where, old, new) for old, new in zip(self._accepted, self._live, strict=True)]
        _copy(source, self._live)

    def rejected(self) -> int:
        """How many batches norms of ours have left out because their statistics were not finite."""
        return int(torch.stack(self._rejected).sum()) if self._rejected else 0


def _copy(source: list[Tensor], target: list[Tensor]) -> None:
    if not source:
        return
    with torch.no_grad():
        torch._foreach_copy_(target, source)  # pyright: ignore[reportPrivateImportUsage]


def _buffers(model: nn.Module) -> Iterator[Tensor]:
    """The buffers of all norms that are part of their state."""
    for _, norm in norms_of(model):
        for module in norm.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    yield buffer
