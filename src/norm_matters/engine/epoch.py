"""An epoch under way: what it has given so far, besides what the network has become."""

from collections.abc import Mapping
from typing import Any

import torch

from norm_matters.core.distributed import Group
from norm_matters.engine.metrics import Meter


class EpochSoFar:
    """What the row of an epoch is made of, kept so that the epoch can be left and taken up again at any step.

    Args:
        number: of the epoch, from 0.
        device: of the training.

    Attributes:
        meter: loss and hits of the steps so far, on this rank.
        learning_rate: of the last step.
        seconds: of training so far.
    """

    def __init__(self, number: int, device: torch.device) -> None:
        self.number = number
        self.meter = Meter(device)
        self.learning_rate = 0.0
        self.seconds = 0.0

    def numbers(self, group: Group) -> dict[str, Any]:
        """All of it, of all ranks, as JSON can hold it; all ranks call this."""
        return {
            "number": self.number,
            "sums": group.gather(self.meter.sums()),
            "classes": self.meter.classes,
            "learning_rate": self.learning_rate,
            "seconds": self.seconds,
        }

    @classmethod
    def load(cls, numbers: Mapping[str, Any], device: torch.device, group: Group) -> "EpochSoFar":
        """What `numbers` gave, on this rank. Where the number of ranks is another, the first has all."""
        so_far = cls(int(numbers["number"]), device)
        so_far.learning_rate, so_far.seconds = float(numbers["learning_rate"]), float(numbers["seconds"])
        parts = numbers["sums"]
        if len(parts) != group.world:
            total = [sum(values) for values in zip(*parts, strict=True)]
            parts = [total, *([0.0] * len(total) for _ in range(group.world - 1))]
        so_far.meter.load(parts[group.rank], int(numbers["classes"]))
        return so_far
