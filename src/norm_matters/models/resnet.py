"""Residual networks, He et al. 2015 (arXiv 1512.03385), for small images and for ImageNet.

Bottlenecks have their stride in the 3 x 3 convolution, and parameters have torchvision's names, so that its
weights load as they are. Shortcuts that change the shape are 1 x 1 convolutions with a norm.

With the option `activation: trelu` they train without norms, their weights bounded (Hoffer et al. 2018).
"""

import abc
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor, nn

from norm_matters.models.entry import DropRate, ModelEntry, Network, Width
from norm_matters.models.layers import Activation, initialise, make_activation
from norm_matters.norms import normalise_and_activate

if TYPE_CHECKING:
    from norm_matters.norms import NormFactory

Stem = Literal["imagenet", "small"]


@dataclass(frozen=True)
class Style:
    """How the blocks of a network are activated and summed.

    Attributes:
        activation: `relu`, or `trelu` for networks without norms.
        share: of a block's branch in the variance of the sum; used with `trelu`.
    """

    activation: Activation
    share: float

    @property
    def bias(self) -> bool:
        """Whether convolutions have a bias of their own: without norms, nothing else has one."""
        return self.activation == "trelu"


def make_shortcut(
    in_channels: int, out_channels: int, *, stride: int, norm: "NormFactory", style: Style
) -> nn.Module | None:
    """The layers beside a block: None where input and output have the same shape."""
    if stride == 1 and in_channels == out_channels:
        return None
    conv = nn.Conv2d(in_channels, out_channels, 1, stride=stride, bias=style.bias)
    return nn.Sequential(conv, norm(out_channels))


def small_image_entry(depth: int, *, regime: str = "resnet-cifar") -> ModelEntry:
    """The network of `depth` layers (6n + 2) with three stages, for images of 32 x 32 or so."""
    blocks = (depth - 2) // 6
    assert depth == 6 * blocks + 2

    def build(
        *,
        num_classes: int,
        in_channels: int,
        norm: "NormFactory",
        width: Width = 16,
        dropout: DropRate = 0.0,
        activation: Activation = "relu",
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
            activation=activation,
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
        activation: Activation = "relu",
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
            activation=activation,
        )

    return ModelEntry(build, "resnet-imagenet", published)


class Block(nn.Module, abc.ABC):
    """A branch of convolutions beside a shortcut.

    With `relu` their sum is activated: `relu(branch(x) + shortcut(x))`. The translated ReLU stretches what is positive
    1.7-fold, and a stack of such sums explodes: with `trelu` the sum goes on as it is, both sides weighted so that its
    variance stays 1, `sqrt(share) branch(trelu(x)) + sqrt(1 - share) x`.

    A subclass makes its layers, `relu` and `downsample` the last of them, and names the norm that ends the branch.
    """

    expansion: ClassVar[int]
    style: Style
    relu: nn.Module
    downsample: nn.Module | None

    @property
    @abc.abstractmethod
    def last_norm(self) -> nn.Module:
        """The norm at the branch's end."""

    @abc.abstractmethod
    def branch(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride); all but the last norm."""

    def forward(self, x_nchw: Tensor) -> Tensor:
        """(N, in_channels, H, W) to (N, out_channels, H / stride, W / stride)."""
        if self.style.activation == "relu":
            out = self.branch(x_nchw)
            shortcut = x_nchw if self.downsample is None else self.downsample(x_nchw)
            return normalise_and_activate(self.last_norm, self.relu, out, shortcut)
        active = self.relu(x_nchw)
        shortcut = x_nchw if self.downsample is None else self.downsample(active)
        return self.style.share**0.5 * self.last_norm(self.branch(active)) + (1 - self.style.share) ** 0.5 * shortcut


class BasicBlock(Block):
    """Two 3 x 3 convolutions and a shortcut."""

    expansion = 1

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: "NormFactory", style: Style) -> None:
        super().__init__()
        self.style = style
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=style.bias)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=style.bias)
        self.bn2 = norm(channels)
        self.relu = make_activation(style.activation)
        self.downsample = make_shortcut(in_channels, channels, stride=stride, norm=norm, style=style)

    def branch(self, x_nchw: Tensor) -> Tensor:
        """See the base class."""
        return self.conv2(normalise_and_activate(self.bn1, self.relu, self.conv1(x_nchw)))

    @property
    def last_norm(self) -> nn.Module:
        """See the base class."""
        return self.bn2


class Bottleneck(Block):
    """A 1 x 1, a 3 x 3 and a 1 x 1 convolution and a shortcut; four times as many channels leave it."""

    expansion = 4

    def __init__(self, in_channels: int, channels: int, *, stride: int, norm: "NormFactory", style: Style) -> None:
        super().__init__()
        self.style = style
        out_channels = channels * self.expansion
        self.conv1 = nn.Conv2d(in_channels, channels, 1, bias=style.bias)
        self.bn1 = norm(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, stride=stride, padding=1, bias=style.bias)
        self.bn2 = norm(channels)
        self.conv3 = nn.Conv2d(channels, out_channels, 1, bias=style.bias)
        self.bn3 = norm(out_channels)
        self.relu = make_activation(style.activation)
        self.downsample = make_shortcut(in_channels, out_channels, stride=stride, norm=norm, style=style)

    def branch(self, x_nchw: Tensor) -> Tensor:
        """See the base class."""
        out = normalise_and_activate(self.bn1, self.relu, self.conv1(x_nchw))
        out = normalise_and_activate(self.bn2, self.relu, self.conv2(out))
        return self.conv3(out)

    @property
    def last_norm(self) -> nn.Module:
        """See the base class."""
        return self.bn3


class ResNet(Network):
    """Stem, stages of blocks that halve the image and double the channels, mean over the image, linear layer.

    Args:
        block: the kind of block.
        blocks: how many in each stage; three or four stages.
        width: channels of the first stage.
        stem: `imagenet` (7 x 7 of stride 2 and a pooling) or `small` (3 x 3).
        dropout: applied before the linear layer.
        activation: `relu`; or `trelu`, for networks without norms: see `Block`. Every block has the same share then.
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
        activation: Activation,
    ) -> None:
        super().__init__()
        style = Style(activation, share=1 / sum(blocks))
        large = stem == "imagenet"
        self.min_input_size = 2 ** (len(blocks) - 1) * (4 if large else 1)
        self.conv1 = (
            nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=style.bias)
            if large
            else nn.Conv2d(in_channels, width, 3, padding=1, bias=style.bias)
        )
        self.bn1 = norm(width)
        # The translated ReLU comes first in every block, so the stem goes without, and the last block needs one more.
        self.relu = make_activation("relu") if activation == "relu" else nn.Identity()
        self.last_relu = nn.Identity() if activation == "relu" else make_activation(activation)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1) if large else nn.Identity()
        channels = width
        self.stages = [f"layer{number}" for number in range(1, len(blocks) + 1)]
        for index, (name, count) in enumerate(zip(self.stages, blocks, strict=True)):
            layers = []
            for position in range(count):
                stride = 2 if index > 0 and position == 0 else 1
                layers.append(block(channels, width * 2**index, stride=stride, norm=norm, style=style))
                channels = width * 2**index * block.expansion
            self.add_module(name, nn.Sequential(*layers))
        self.dropout = nn.Dropout(dropout)
        self.fc = nn.Linear(channels, num_classes)
        initialise(self, head=self.fc, activation=activation)

    def forward(self, images_nchw: Tensor) -> Tensor:
        """Scores (N, classes) of the images (N, C, H, W)."""
        x = self.maxpool(normalise_and_activate(self.bn1, self.relu, self.conv1(images_nchw)))
        for name in self.stages:
            x = self.get_submodule(name)(x)
        return self.fc(self.dropout(self.last_relu(x).mean(dim=(2, 3))))


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
