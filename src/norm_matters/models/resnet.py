"""Residual networks, He et al. 2015 (arXiv 1512.03385), for small images and for ImageNet.

Bottlenecks have their stride in the 3 x 3 convolution, and parameters have torchvision's names, so that its
weights load as they are. Shortcuts that change the shape are 1 x 1 convolutions with a norm.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from torch import Tensor, nn

from norm_matters.models.entry import DropRate, ModelEntry, Network, Width
from norm_matters.models.layers import initialise

if TYPE_CHECKING:
    from norm_matters.norms import NormFactory

Stem = Literal["imagenet", "small"]


def make_shortcut(in_channels: int, out_channels: int, *, stride: int, norm: "NormFactory") -> nn.Module | None:
    """The layers beside a block: None where input and output have the same shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    return nn.Sequential(nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=False), norm(out_channels))


def small_image_entry(depth: int, *, regime: str = "resnet-cifar") -> ModelEntry:
    """The network of `depth` layers (6n + 2) with three stages, for images of 32 x 32 or so."""
    blocks = (depth - 2) // 6
    assert depth == 6 * blocks + 2

    def build(
        *, num_classes: int, in_channels: int, norm: "NormFactory", width: Width = 16, dropout: DropRate = 0.0
    ) -> ResNet:
        return ResNet(
            BasicBlock,
            [blocks] * 3,
            width=width,
            stem="small",
            num_classes=num_classes,
            in_channels=in_channels,
            norm=norm,
            dropout=dropout,
        )

    return ModelEntry(build, regime)


def imagenet_entry(block: "type[BasicBlock | Bottleneck]", blocks: Sequence[int], *, published: str) -> ModelEntry:
    """The network with four stages of that many blocks."""

    def build(
        *,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        width: Width = 64,
        stem: Stem = "imagenet",
        dropout: DropRate = 0.0,
    ) -> ResNet:
        return ResNet(
            block,
            blocks,
            width=width,
            stem=stem,
            num_classes=num_classes,
            in_channels=in_channels,
            norm=norm,
            dropout=dropout,
        )

    return ModelEntry(build, "resnet-imagenet", published)


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: "NormFactory") -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(in_channels, channels, stride=stride, norm=norm)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x_nchw)))
        out = self.bn2(self.conv2(out))
        return self.relu(out + (x_nchw if self.downsample is None else self.downsample(x_nchw)))


class Bottleneck(nn.Module):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution and a shortcut; four times as many channels leave it."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: "NormFactory") -> None:
        super().__init__()
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=False)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=False)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=False)
        self.bn3 = norm(out_channels)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = make_shortcut(in_channels, out_channels, stride=stride, norm=norm)

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, 4 channels, H / stride, W / stride)."""
        out = self.relu(self.bn1(self.conv1(x_nchw)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        return self.relu(out + (x_nchw if self.downsample is None else self.downsample(x_nchw)))


class ResNet(Network):
    """Stem, stages of blocks that halve the image and double the channels, mean over the image, linear layer.

    Args:
        block: the kind of block.
        blocks: how many in each stage; three or four stages.
        width: channels of the first stage.
        stem: `imagenet` (7 x 7 of stride 2 and a pooling) or `small` (3 x 3).
        dropout: applied before the linear layer.
    """

    def __init__(
        self,
        block: type[BasicBlock | Bottleneck],
        blocks: Sequence[int],
        *,
        width: int,
        stem: Stem,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        dropout: float,
    ) -> None:
        super().__init__()
        large = stem == "imagenet"
        self.min_input_size = 2 ** (len(blocks) - 1) * (4 if large else 1)
        self.conv1 = (
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False)
            if large
            else nn.Conv2d(in_channels, width, 3, padding=1, bias=False)
        )
        self.bn1 = norm(width)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        channels = width
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for index, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            layers = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                layers.append(block(channels, width * 2**index, stride=stride, norm=norm))
                channels = width * 2**index * block.expansion
            self.add_module(name, nn.Sequential(*layers))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, head=self.fc)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Scores (N, classes) of the images (N, C, H, W)."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(images_nchw))))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.dropout(x.mean(dim=(2, 3))))


resnet8 = small_image_entry(8, regime="digits")
resnet20 = small_image_entry(20)
resnet32 = small_image_entry(32)
resnet44 = small_image_entry(44)
resnet56 = small_image_entry(56)
resnet110 = small_image_entry(110)
resnet18 = imagenet_entry(BasicBlock, (2, 2, 2, 2), published="resnet18")
resnet34 = imagenet_entry(BasicBlock, (3, 4, 6, 3), published="resnet34")
resnet50 = imagenet_entry(Bottleneck, (3, 4, 6, 3), published="resnet50")
resnet101 = imagenet_entry(Bottleneck, (3, 4, 23, 3), published="resnet101")
resnet152 = imagenet_entry(Bottleneck, (3, 8, 36, 3), published="resnet152")
