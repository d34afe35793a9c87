"""Weight standardisation (Qiao et al. 2019, arXiv 1903.10520; scaled: Brock et al. 2021, arXiv 2101.08692)."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.spec import Option
from norm_matters.weights.base import WeightNorm


class StandardisedWeight(WeightNorm):
    """`w_i = gain (v_i - mean(v_i)) / sqrt(var(v_i) + eps)` for every output channel i.

    Args:
        weight, layout: see the base class.
        gain: a constant factor.
        scaled: divide by the root of the number of a channel's weights too, so that a channel has the length `gain`
            and the layer keeps the variance of its input: needed where no norm follows.
        eps: added to the variance; 1e-10 is the 1e-5 that Qiao et al. add to the deviation. A channel whose variance is
            not above it counts as constant: it is centred and not scaled, `w_i = v_i - mean(v_i)`.
    """

    name = "standardised"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "gain": Option("float", 1.0, minimum=0, above=True),
        "scaled": Option("bool", False),
        "eps": Option("float", 1e-10, minimum=0, above=True),
    }
    gain: float
    scaled: bool
    eps: float

    def normalise(self, v: Tensor) -> Tensor:
        """See the base class."""
        dims = self.layout.reduced(v)
        var, mean = torch.var_mean(v, dims, correction=0, keepdim=True)
        count = v.numel() / self.channels if self.scaled else 1.0
        # As with vectors of length zero: what has no deviation passes its gradient unchanged, not 1e5-fold.
        return (v - mean) * torch.where(var > self.eps, self.gain / torch.sqrt((var + self.eps) * count), 1.0)
