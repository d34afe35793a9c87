"""VGG, Simonyan and Zisserman 2014 (arXiv 1409.1556), with a norm after each convolution.

As in the weight decay experiments of *Norm matters*: convolutions with bias, and one linear layer. `head=classic`
puts the original three linear layers there; layers then have the places and names of torchvision's `vgg*_bn`.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from norm_matters.models.entry import DropRate, ModelEntry, Network, Width
from norm_matters.models.layers import FixedGrid, initialise

if TYPE_CHECKING:
    from norm_matters.norms import NormFactory

Head = Literal["linear", "classic"]

_WIDTHS = (1, 2, 4, 8, 8)
"""Channels of the five stages, in units of `width`."""


def vgg_entry(blocks: Sequence[int], *, published: str) -> ModelEntry:
    """The network with five stages of that many convolutions."""

    def build(
        *,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        width: Width = 64,
        head: Head = "linear",
        dropout: DropRate | None = None,
    ) -> VGG:
        return VGG(
            blocks,
            width=width,
            head=head,
            num_classes=num_classes,
            in_channels=in_channels,
            norm=norm,
            dropout=dropout,
        )

    return ModelEntry(build, "vgg-cifar", published)


class VGG(Network):
    """Five stages of 3 x 3 convolutions, each followed by a pooling, and the head.

    Args:
        blocks: convolutions in each stage.
        width: channels of the first stage.
        head: `linear` (mean over the image, one linear layer) or `classic` (7 x 7 grid, three linear layers).
        dropout: in the head; by default none before the single layer and one half in the classic one.
    """

    min_input_size = 32

    def __init__(
        self,
        blocks: Sequence[int],
        *,
        width: int,
        head: Head,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        dropout: float | None,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for count, multiple in zip(blocks, _WIDTHS, strict=True):
            for _ in range(count):
                layers += [nn.Conv2d(channels, width * multiple, 3, padding=1), norm(width * multiple)]
                layers.append(nn.ReLU(inplace=True))
                channels = width * multiple
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        if head == "linear":
            last = nn.Linear(channels, num_classes)
            self.avgpool = FixedGrid(1)
            self.dropout = nn.Dropout(dropout or 0.0)
            self.classifier = last
        else:
            hidden, rate = width * 64, 0.5 if dropout is None else dropout
            last = nn.Linear(hidden, num_classes)
            self.avgpool = FixedGrid(7)
            self.dropout = nn.Identity()
            self.classifier = nn.Sequential(
                *(nn.Linear(channels * 49, hidden), nn.ReLU(inplace=True), nn.Dropout(rate)),
                *(nn.Linear(hidden, hidden), nn.ReLU(inplace=True), nn.Dropout(rate)),
                last,
            )
        initialise(self, head=last)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Scores (N, classes) of the images (N, C, H, W)."""
        x = self.avgpool(self.features(images_nchw)).flatten(1)
        return self.classifier(self.dropout(x))


vgg11 = vgg_entry((1, 1, 2, 2, 2), published="vgg11_bn")
vgg13 = vgg_entry((2, 2, 2, 2, 2), published="vgg13_bn")
vgg16 = vgg_entry((2, 2, 3, 3, 3), published="vgg16_bn")
vgg19 = vgg_entry((2, 2, 4, 4, 4), published="vgg19_bn")
