"""Loss and errors over many batches, summed exactly and read once."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from norm_matters.core.distributed import ALONE, Group

MIN_CLASSES_FOR_TOP5 = 6


class Scores(NamedTuple):
    """Means over all images seen: loss in nats, errors in percent; `error5` is None below six classes."""

    loss: float
    error1: float
    error5: float | None
    images: int


class Meter:
    """Sums loss and hits on the device, so that a batch costs no synchronisation.

    Args:
        device: where the sums live.

    Attributes:
        classes: of the batches seen; 0 before the first.
    """

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(4, dtype=dtype, device=device)
        self.classes = 0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            loss: scalar, the mean over the batch.
            logits: (N, classes).
            labels: (N,) int64.
            counted: flag (no dimension); where it is false the batch is left out.
        """
        with torch.no_grad():
            self.classes = logits.shape[1]
            batch = batch_sums(loss, logits, labels)
            self._sums += batch if counted is None else torch.where(counted, batch, 0.0)

    def scores(self, group: Group = ALONE) -> Scores:
        """Read the means, over all ranks of the group; this waits for the device."""
        return scores_of(group.sums(self.sums()), self.classes)

    def sums(self) -> list[float]:
        """The sums to the last digit (see `batch_sums`); this waits for the device."""
        return self._sums.tolist()

    def load(self, sums: Sequence[float], classes: int) -> None:
        """Go on from what `sums` gave."""
        self._sums.copy_(torch.tensor(sums, dtype=self._sums.dtype))
        self.classes = classes


def batch_sums(loss: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Sums over a batch: of the loss, of hits among the first and the first five, of images; (4,) on the device.

    Args:
        loss, logits, labels: as for `Meter.update`.
    """
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    count = torch.full((), len(labels), device=loss.device)
    # Float64 keeps counts and sums exact; MPS has none, and float32 counts exactly up to 16.7 million images.
    wide = torch.float32 if loss.device.type == "mps" else torch.float64
    return torch.stack([loss * count, hits[:, 0].sum(), hits.sum(), count]).to(wide)


def scores_of(sums: Sequence[float], classes: int) -> Scores:
    """The means that sums over batches (see `batch_sums`) give."""
    loss, hits1, hits5, images = sums
    n = int(images)
    if not n:
        return Scores(float("nan"), float("nan"), None, 0)
    error5 = 100 * (n - hits5) / n if classes >= MIN_CLASSES_FOR_TOP5 else None
    return Scores(loss / n, 100 * (n - hits1) / n, error5, n)
