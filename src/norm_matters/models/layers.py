"""Initial weights, and the layers the families share."""

import math
from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Activation = Literal["relu", "trelu"]
"""What follows a layer: `ReLU`, or `TranslatedReLU`."""


def make_activation(kind: Activation) -> nn.Module:
    """An activation of that kind."""
    return nn.ReLU(inplace=True) if kind == "relu" else TranslatedReLU()


def initialise(network: nn.Module, *, head: nn.Linear, activation: Activation = "relu") -> None:
    """Draw the weights in place, from torch's global stream, in the order of the modules.

    Convolutions after He et al. 2015 (arXiv 1502.01852) by fan out, hidden linear layers by fan in; the head
    from N(0, 0.01), so that training starts near equal scores. Biases are zero; norms keep their own start.
    Convolutions that feed a `trelu` have variance 1 / fan in (LeCun et al. 1998), because it halves nothing.

    Args:
        head: the layer that gives the scores.
        activation: what follows the convolutions.
    """
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if module is head:
            nn.init.normal_(module.weight, std=0.01)
        elif isinstance(module, nn.Conv2d) and activation == "trelu":
            nn.init.kaiming_normal_(module.weight, mode="fan_in", nonlinearity="linear")
        else:
            mode = "fan_out" if isinstance(module, nn.Conv2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


class TranslatedReLU(nn.Module):
    """The ReLU, shifted and scaled so that a standard normal input gives mean 0 and variance 1.

    `(relu(x) - 1 / sqrt(2 pi)) / sqrt((1 - 1 / pi) / 2)`: what Hoffer et al. 2018 have in place of a norm after bounded
    weights (`models/trelu.py` of their code).
    """

    MEAN = math.sqrt(1 / (2 * math.pi))
    DEVIATION = math.sqrt((1 - 1 / math.pi) / 2)

    def forward(self, x: Tensor) -> Tensor:
        """Of the shape and dtype of x."""
        return (F.relu(x) - self.MEAN) * (1 / self.DEVIATION)


class FixedGrid(nn.Module):
    """Average to a fixed height and width, so that linear layers can follow; nothing where they are right already.

    The check is more than speed: the backward pass of adaptive pooling is not deterministic on CUDA.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, C, H, W) to (N, C, side, side)."""
        if x_nchw.shape[2:] == (self.side, self.side):
            return x_nchw
        return F.adaptive_avg_pool2d(x_nchw, self.side)

    def extra_repr(self) -> str:
        return f"side={self.side}"
