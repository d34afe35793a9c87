"""The layers of a network whose weights can be normalised, and where a weight's output channels are."""

from dataclasses import dataclass

from torch import Tensor, nn

from norm_matters.norms import norms_of

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
WEIGHTED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
"""Kinds of layers whose `weight` has output channels."""


@dataclass(frozen=True)
class ChannelLayout:
    """Where the output channels are.

    Attributes:
        groups: None: the first dimension of the weight (out, in, *). A number: a transposed convolution's weight
            (in, out / groups, *), in which the channels of a group share a part of the first dimension.
    """

    groups: int | None = None

    def split(self, weight: Tensor) -> Tensor:
        """The weight in the shape that `reduced` speaks of: (out, in, *), or (groups, in / groups, out / groups, *)."""
        return weight if self.groups is None else weight.unflatten(0, (self.groups, -1))

    def merge(self, split: Tensor) -> Tensor:
        """The opposite of `split`."""
        return split if self.groups is None else split.flatten(0, 1)

    def reduced(self, split: Tensor) -> tuple[int, ...]:
        """The dimensions that make up one output channel."""
        return tuple(dim for dim in range(1, split.dim()) if self.groups is None or dim != 2)

    def spread(self, values: Tensor, split: Tensor) -> Tensor:
        """One value per channel, viewed so that it broadcasts against `split`."""
        dims = self.reduced(split)
        return values.view([1 if dim in dims else size for dim, size in enumerate(split.shape)])

    def channels(self, weight: Tensor) -> int:
        """How many output channels there are."""
        return weight.shape[0] if self.groups is None else self.groups * weight.shape[1]


def channel_layout(layer: nn.Module) -> ChannelLayout:
    """Where the output channels of a layer of `WEIGHTED` are."""
    return ChannelLayout(layer.groups if isinstance(layer, _TRANSPOSED) else None)


def last_layer(model: nn.Module) -> str | None:
    """Dotted name of the last layer, norms aside, with a parameter of two or more dimensions; None without any.

    It gives the scores in all but odd networks: the layer that stays plain, and that a regime's group `last` means.
    """
    norms = {id(parameter) for _, norm in norms_of(model) for parameter in norm.parameters()}
    layers = [
        layer_of(name)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and id(parameter) not in norms
    ]
    return layers[-1] if layers else None


def layer_of(parameter: str) -> str:
    """The path of the layer that a parameter belongs to; torch's parametrizations put theirs below the layer."""
    path, parametrized, _ = f".{parameter}".partition(".parametrizations.")
    return path[1:] if parametrized else parameter.rpartition(".")[0]
