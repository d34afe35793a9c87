"""Initial weights, and the layer the families share."""

from torch import Tensor, nn
from torch.nn import functional as F


def initialise(network: nn.Module, *, head: nn.Linear) -> None:
    """Draw the weights in place, from torch's global stream, in the order of the modules.

    Convolutions after He et al. 2015 (arXiv 1502.01852) by fan out, hidden linear layers by fan in; the head
    from N(0, 0.01), so that training starts near equal scores. Biases are zero; norms keep their own start.

    Args:
        head: the layer that gives the scores.
    """
    for module in network.modules():
        if not isinstance(module, nn.Conv2d | nn.Linear):
            continue
        if module is head:
            nn.init.normal_(module.weight, std=0.01)
        else:
            mode = "fan_out" if isinstance(module, nn.Conv2d) else "fan_in"
            nn.init.kaiming_normal_(module.weight, mode=mode, nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)


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
