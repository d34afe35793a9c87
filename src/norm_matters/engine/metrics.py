"""Loss and errors over many batches, summed exactly and read once."""

from typing import NamedTuple

import torch
from torch import Tensor

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
    """

    def __init__(self, device: torch.device) -> None:
        # Float64 keeps counts and sums exact; MPS has none, and float32 counts exactly up to 16.7 million images.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(4, dtype=dtype, device=device)
        self._classes = 0

    def update(self, loss: Tensor, logits: Tensor, labels: Tensor, counted: Tensor | None = None) -> None:
        """Add one batch.

        Args:
            loss: scalar, the mean over the batch.
            logits: (N, classes).
            labels: (N,) int64.
            counted: flag (no dimension); where it is false the batch is left out.
        """
        with torch.no_grad():
            self._classes = logits.shape[1]
            best = logits.topk(min(5, self._classes), dim=1).indices
            hits = best == labels[:, None]
            count = torch.full((), len(labels), device=loss.device)
            batch = torch.stack([loss * count, hits[:, 0].sum(), hits.sum(), count]).to(self._sums.dtype)
            self._sums += batch if counted is None else torch.where(counted, batch, 0.0)

    def scores(self) -> Scores:
        """Read the means; this waits for the device."""
        loss, hits1, hits5, images = self._sums.tolist()
        n = int(images)
        if not n:
            return Scores(float("nan"), float("nan"), None, 0)
        error5 = 100 * (n - hits5) / n if self._classes >= MIN_CLASSES_FOR_TOP5 else None
        return Scores(loss / n, 100 * (n - hits1) / n, error5, n)
