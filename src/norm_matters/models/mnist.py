"""A small convolutional network for MNIST and its kin."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from norm_matters.models.entry import DropRate, ModelEntry, Network, Width
from norm_matters.models.layers import FixedGrid, initialise

if TYPE_CHECKING:
    from norm_matters.norms import NormFactory


class MnistNet(Network):
    """Two 5 x 5 convolutions with poolings, a hidden linear layer and the head.

    Args:
        width: channels of the first convolution; the second has twice, the hidden layer 16 times as many.
        dropout: before the head.
    """

    min_input_size = 16

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        width: Width = 32,
        dropout: DropRate = 0.5,
    ) -> None:
        super().__init__()
        w = width
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, w, 5, bias=False), nn.MaxPool2d(2), norm(w), nn.ReLU(inplace=True)),
            *(nn.Conv2d(w, 2 * w, 5, bias=False), nn.MaxPool2d(2), norm(2 * w), nn.ReLU(inplace=True)),
        )
        last = nn.Linear(16 * w, num_classes)
        self.classifier = nn.Sequential(
            *(FixedGrid(4), nn.Flatten()),
            *(nn.Linear(32 * w, 16 * w, bias=False), norm(16 * w), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            last,
        )
        initialise(self, head=last)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Scores (N, classes) of the images (N, C, H, W)."""
        return self.classifier(self.features(images_nchw))


mnist = ModelEntry(MnistNet, "mnist")
