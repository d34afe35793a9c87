"""What every family of instruments is."""

import abc
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from torch import Tensor


class Column(NamedTuple):
    """A piece of a row: `size` values of one instrument for one layer."""

    instrument: str
    layer: str
    size: int


class Instrument(abc.ABC):
    """One family. The calls come in this order: any number of (`before_step`, `after_step`), then `end_epoch`.

    Attributes:
        columns: what `end_epoch` returns, fixed for the whole run.
    """

    columns: list[Column]

    def before_step(self) -> None:  # noqa: B027
        """Called before a step that is measured."""

    def after_step(self, *, made: bool) -> None:  # noqa: B027
        """Called after it; `made` says whether the optimizer moved (not after an overflow)."""

    def tensors(self) -> dict[str, Tensor]:
        """What `end_epoch` needs of the steps so far, for a checkpoint; nothing where it needs none of them."""
        return {}

    def load(self, tensors: Mapping[str, Tensor]) -> None:  # noqa: B027
        """Go on from what `tensors` gave, on the CPU."""

    @abc.abstractmethod
    def end_epoch(self, images: Tensor) -> list[np.ndarray]:
        """What is known of the epoch.

        Args:
            images: the epoch's last batch, as it was trained on.

        Returns:
            Float64, one vector for each of `columns`, of its size; NaN where there is no value.
        """
