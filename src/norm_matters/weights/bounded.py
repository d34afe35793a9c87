"""Bounded weight norm (Hoffer et al. 2018, section 5), and the variant of the code released with the paper."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from norm_matters.norms.spec import Option
from norm_matters.weights.base import WeightNorm, rescale, scale_per_channel, wide_dtype
from norm_matters.weights.layers import ChannelLayout

P = Option("word", "2", words=("1", "2", "inf"), shown=True)


def bound_of(v: Tensor, p: float, channels: int) -> Tensor:
    """The paper's rho: `|V|_p / N^(1/p)` over the N channels together, a number.

    Raises:
        ValueError: it is zero or not finite, and a layer with it could never learn.
    """
    rho = torch.linalg.vector_norm(v, p) / channels ** (1 / p)
    # A weight on the meta device has no values to look at.
    if not rho.is_meta and not (rho > 0 and rho.isfinite()):
        raise ValueError(f"its weights have the norm {rho:g}, which cannot bound them; initialise or exclude the layer")
    return rho


class BoundedWeightNorm(WeightNorm):
    """`w_i = rho v_i / |v_i|_p` for every output channel i.

    rho is one number per layer, fixed by the weights that the layer has when it is wrapped, and kept in a buffer.

    Args:
        weight, layout: see the base class.
        p: 1, 2 or inf.
        learn_g: the released code's variant, not the paper's: a learned g per channel of which only the length is
            fixed, `w_i = rho sqrt(N) g_i / |g|_2 * v_i / |v_i|_p`; rho is the root mean square of the initial norms.
    """

    name = "bounded"
    OPTIONS: ClassVar[Mapping[str, Option]] = {"p": P, "learn_g": Option("bool", False)}
    p: str
    learn_g: bool
    rho: Tensor
    g: nn.Parameter | None

    def __init__(self, weight: Tensor, layout: ChannelLayout, **options: Any) -> None:
        super().__init__(weight, layout, **options)
        self.register_buffer("rho", torch.zeros((), device=weight.device, dtype=wide_dtype(weight.dtype)))
        self.g = scale_per_channel(weight, self.channels) if self.learn_g else None

    def normalise(self, v: Tensor) -> Tensor:
        """See the base class."""
        dims, length = self.layout.reduced(v), self.rho
        if self.g is not None:
            g = rescale(self.g.to(v.dtype), self.rho * self.channels**0.5, 2, (0,))
            length = self.layout.spread(g, v)
        return rescale(v, length, float(self.p), dims)

    @torch.no_grad()
    def start(self, v: Tensor) -> Tensor:
        """See the base class."""
        if self.g is None:
            self.rho.copy_(bound_of(v, float(self.p), self.channels))
        else:
            norms = torch.linalg.vector_norm(v, float(self.p), self.layout.reduced(v))
            self.rho.copy_(bound_of(norms, 2, self.channels))
            self.g.copy_(norms.flatten())
        return v
