"""AlexNet in one column, Krizhevsky 2014 (arXiv 1404.5997), with a norm after each layer but the last."""

from typing import TYPE_CHECKING

from torch import Tensor, nn

from norm_matters.models.entry import DropRate, ModelEntry, Network, Width
from norm_matters.models.layers import FixedGrid, initialise

if TYPE_CHECKING:
    from norm_matters.norms import NormFactory


class AlexNet(Network):
    """Five convolutions and three linear layers; where there is a pooling, the norm follows it, on fewer values.

    Args:
        width: channels of the first convolution; the hidden linear layers have 64 times as many.
        dropout: after the norm and the activation of each hidden linear layer.
    """

    min_input_size = 63

    def __init__(
        self,
        *,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        width: Width = 64,
        dropout: DropRate = 0.5,
    ) -> None:
        super().__init__()
        pool = nn.MaxPool2d(3, stride=2)
        w, hidden = width, width * 64
        self.features = nn.Sequential(
            *(nn.Conv2d(in_channels, w, 11, stride=4, padding=2, bias=False), pool, norm(w), nn.ReLU(inplace=True)),
            *(nn.Conv2d(w, 3 * w, 5, padding=2, bias=False), pool, norm(3 * w), nn.ReLU(inplace=True)),
            *(nn.Conv2d(3 * w, 6 * w, 3, padding=1, bias=False), norm(6 * w), nn.ReLU(inplace=True)),
            *(nn.Conv2d(6 * w, 4 * w, 3, padding=1, bias=False), norm(4 * w), nn.ReLU(inplace=True)),
            *(nn.Conv2d(4 * w, 4 * w, 3, padding=1, bias=False), pool, norm(4 * w), nn.ReLU(inplace=True)),
        )
        last = nn.Linear(hidden, num_classes)
        self.classifier = nn.Sequential(
            *(FixedGrid(6), nn.Flatten()),
            *(nn.Linear(4 * w * 36, hidden, bias=False), norm(hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            *(nn.Linear(hidden, hidden, bias=False), norm(hidden), nn.ReLU(inplace=True), nn.Dropout(dropout)),
            last,
        )
        initialise(self, head=last)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Scores (N, classes) of the images (N, C, H, W)."""
        return self.classifier(self.features(images_nchw))


alexnet = ModelEntry(AlexNet, "alexnet")
