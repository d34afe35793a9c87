"""Weight normalisation (Salimans & Kingma 2016, arXiv 1602.07868)."""

from typing import Any

import torch
from torch import Tensor

from norm_matters.weights.base import WeightNorm, rescale, scale_per_channel
from norm_matters.weights.layers import ChannelLayout


class LearnedWeightNorm(WeightNorm):
    """`w_i = g_i v_i / |v_i|_2` with a learned g per output channel; at first w is v, bit by bit.

    Args:
        weight, layout: see the base class.
    """

    name = "weight"

    def __init__(self, weight: Tensor, layout: ChannelLayout, **options: Any) -> None:
        super().__init__(weight, layout, **options)
        self.g = scale_per_channel(weight, self.channels)

    def normalise(self, v: Tensor) -> Tensor:
        """See the base class."""
        return rescale(v, self.layout.spread(self.g.to(v.dtype), v), 2, self.layout.reduced(v))

    @torch.no_grad()
    def start(self, v: Tensor) -> Tensor:
        """See the base class."""
        self.g.copy_(torch.linalg.vector_norm(v, 2, self.layout.reduced(v)).flatten())
        return v
