"""A scale and a shift per output channel, taken into the weight and bias of the layer that gives the channels."""

from typing import Any

import torch
from torch import Tensor, nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED, nn.Linear)
"""Kinds of layers that can be folded into."""


def folded(layer: Any, scale: Tensor, shift: Tensor) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight and bias of a layer that gives `scale * layer(x) + shift`.

    Args:
        layer: one of `LAYERS`; grouped, dilated, strided, with or without bias; unchanged.
        scale, shift: per output channel (C,), float64; the arithmetic is theirs.

    Returns:
        Parameters in the dtype, device and memory layout of the layer's weight.
    """
    weight = layer.weight.detach()
    bias = shift if layer.bias is None else shift + scale * layer.bias.detach().to(scale)
    new = scaled_per_channel(layer, weight.to(scale.dtype), scale).to(weight.dtype)
    return (
        nn.Parameter(new, requires_grad=layer.weight.requires_grad),
        nn.Parameter(bias.to(weight.dtype), requires_grad=layer.weight.requires_grad),
    )


def scaled_per_channel(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """The weight times `scale` (C,), output channel by output channel."""
    if not isinstance(layer, _TRANSPOSED):
        return weight * scale.view(-1, *[1] * (weight.dim() - 1))
    # (in, out / groups, *): each group of inputs has outputs of its own.
    groups = weight.unflatten(0, (layer.groups, -1))
    return (groups * scale.view(layer.groups, 1, -1, *[1] * (weight.dim() - 2))).flatten(0, 1)


def scales_with_weight(layer: Any, x: Tensor) -> bool:
    """Whether the output of a layer scales with its weight, channel by channel, as torch's own layers' does.

    Tried on its input x. A layer that standardises its weight gives the same output for any scale, and cannot take one.
    """
    weight = layer.weight.detach()
    scale = torch.linspace(0.5, 2, channel_count_of(layer), device=weight.device, dtype=weight.dtype)
    without_bias = {} if layer.bias is None else {"bias": torch.zeros_like(layer.bias)}
    plain, scaled = (
        torch.func.functional_call(layer, {"weight": tensor, **without_bias}, (x,))
        for tensor in (weight, scaled_per_channel(layer, weight, scale))
    )
    expected = plain * scale.view(-1, *[1] * (plain.dim() - 2))
    tolerance = 16 * torch.finfo(weight.dtype).eps * expected.abs().max()
    return bool((scaled - expected).abs().max() <= tolerance)


def channel_count_of(layer: Any) -> int:
    """The number of output channels."""
    return layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels
