"""The contract of a normalised weight: a torch parametrization that works per output channel.

The parameter that is trained (`original` in torch's words, v in the formulas) is the very object that the layer had
before, so an optimizer built earlier stays valid. Nothing is written in a forward pass: evaluation changes no weight.
"""

import abc
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from norm_matters.norms.spec import Option, canonical_text, complete_options
from norm_matters.weights.layers import ChannelLayout

# A shorter vector counts as one of length zero: the gradient of its direction would leave float32's range.
SHORTEST = 1e-18


def rescale(v: Tensor, length: Tensor, p: float, dims: tuple[int, ...]) -> Tensor:
    """Give every channel of v the p-norm `length`.

    A channel of length zero stays as it is, and its gradient passes unchanged: the next step gives it a direction.

    Args:
        v: float32 or wider.
        length: broadcasts against the norms of v, which are taken over `dims` and keep them.
    """
    norm = torch.linalg.vector_norm(v, p, dims, keepdim=True)
    has_direction = norm > SHORTEST
    # The inner choice keeps 0/0 out of the branch that is not taken, whose gradient would be NaN times 0.
    factor = torch.where(has_direction, length / torch.where(has_direction, norm, 1.0), 1.0)
    return v * factor


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """Float32, or `dtype` where that is wider."""
    return torch.promote_types(dtype, torch.float32)


def scale_per_channel(weight: Tensor, channels: int) -> nn.Parameter:
    """A parameter (channels,) of ones, which trains where the weight does."""
    return nn.Parameter(
        torch.ones(channels, device=weight.device, dtype=weight.dtype), requires_grad=weight.requires_grad
    )


class WeightNorm(nn.Module, abc.ABC):
    """A parametrization of one weight.

    A subclass names itself (`name`), declares in `OPTIONS` what it takes, finds each option in an attribute of that
    name, and computes in `normalise`. Norms are taken in float32, or in the weight's dtype where that is wider;
    buffers stay so under `.half()`.

    Args:
        weight: of the layer; decides device and dtype of parameters and buffers, whose values come from
            `right_inverse` when the parametrization is registered.
        layout: where the output channels are in it.
        options: values for some of `OPTIONS`.

    Raises:
        UserError: an option is unknown or its value invalid.
    """

    name: ClassVar[str]
    OPTIONS: ClassVar[Mapping[str, Option]] = {}

    def __init__(self, weight: Tensor, layout: ChannelLayout, **options: Any) -> None:
        super().__init__()
        self.layout = layout
        self.channels = layout.channels(weight)
        for key, value in complete_options(self.name, options, self.OPTIONS).items():
            setattr(self, key, value)

    @abc.abstractmethod
    def normalise(self, v: Tensor) -> Tensor:
        """The effective weight of v; both as `ChannelLayout.split` gives them, float32 or wider."""

    @torch.no_grad()
    def start(self, v: Tensor) -> Tensor:
        """Take what is fixed or learned from a new weight (laid out as in `normalise`); return the v to train."""
        return v

    def forward(self, v: Tensor) -> Tensor:
        """The effective weight, of the shape and dtype of v."""
        return self._in_wide_split(self.normalise, v)

    def right_inverse(self, weight: Tensor) -> Tensor:
        """Start anew from this weight: what torch calls when the layer is wrapped and on `layer.weight = ...`."""
        return self._in_wide_split(self.start, weight)

    def settings(self) -> dict[str, Any]:
        """The value of every option."""
        return {key: getattr(self, key) for key in self.OPTIONS}

    @property
    def spec(self) -> str:
        """Canonical text of the weight norm and its options."""
        return canonical_text(self.name, self.settings(), self.OPTIONS)

    def extra_repr(self) -> str:
        """`'bounded:p=2', 64 channels`."""
        return f"{self.spec!r}, {self.channels} channels"

    def _in_wide_split(self, function: Callable[[Tensor], Tensor], v: Tensor) -> Tensor:
        wide = self.layout.split(v).to(wide_dtype(v.dtype))
        return self.layout.merge(function(wide)).to(v.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "WeightNorm":
        """Move and cast as any module; but `.half()` and the like leave buffers in float32 or wider."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for key, old in before.items():
            new = self._buffers[key]
            if old is not None and new is not None and wide_dtype(new.dtype) != new.dtype:
                self._buffers[key] = old.to(device=new.device, dtype=torch.float32)
        return self
