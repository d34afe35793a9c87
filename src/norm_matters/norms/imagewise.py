"""Norms within each image: group, layer, instance and position norm, by any statistic.

Training and evaluation are the same: nothing is tracked. Each set of values that share a mean and a sigma is made a
channel of one image, so that the statistics of the batch norms serve here unchanged; l2 has torch's own kernels.
"""

import abc
from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from norm_matters.core.errors import UserError
from norm_matters.norms.base import AFFINE_OPTIONS, AffineNorm
from norm_matters.norms.spec import Option
from norm_matters.norms.statistic import normalise_by
from norm_matters.norms.which import canonical_statistic, statistic_norm

IMAGE_OPTIONS: Mapping[str, Option] = {
    "statistic": Option("text", "l2", canonical=canonical_statistic),
    **AFFINE_OPTIONS,
}


class ImagewiseNorm(AffineNorm):
    """A norm whose statistics are taken within each image.

    Args:
        num_features: channels C.
        statistic: spec of a batch norm, whose estimate of sigma is taken: `l1`, `topk:k=10`.
        options: those of `AffineNorm`.
    """

    OPTIONS: ClassVar[Mapping[str, Option]] = IMAGE_OPTIONS
    statistic: str

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        estimator = statistic_norm(self.statistic)
        # Not the estimator itself: it would be a layer of the model, and counted as a norm.
        self.statistic_for = estimator.statistic_for
        self.estimates_sigma = estimator.estimates_sigma

    @abc.abstractmethod
    def rows(self, x: Tensor) -> Tensor:
        """View or copy x as (1, sets, values, ...): what shares a mean and a sigma is one channel."""

    @abc.abstractmethod
    def unrows(self, rows: Tensor, x: Tensor) -> Tensor:
        """The inverse of `rows`, in the shape of x."""

    @abc.abstractmethod
    def normalise_by_l2(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The whole norm for the statistic l2, by torch's kernel."""

    def normalise(self, x: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: the values that share a mean are one only.
        """
        rows = self.rows(x)
        n = rows[0, :1].numel()
        if n == 1:
            raise ValueError(f"{self.label()} needs more than one value per mean, got {tuple(x.shape)}")
        dtype, reducer = self.compute_dtype(x), self.reducer()
        if self.statistic == "l2" and reducer.plain:
            return self.normalise_by_l2(x.to(dtype), *self.affine_in(dtype)).to(x.dtype)
        y, _, _ = normalise_by(
            rows,
            None,
            None,
            eps=self.eps if self.estimates_sigma else 0.0,
            statistic=self.statistic_for(n),
            dtype=dtype,
            n=n,
            reducer=reducer,
        )
        return self._affine(self.unrows(y, x))

    def _affine(self, x: Tensor) -> Tensor:
        """Weight and bias per channel, in the dtype that statistics are kept in."""
        dtype = self.compute_dtype(x)
        shape = [1] * x.dim()
        shape[self.channel_dim] = -1
        weight, bias = (None if value is None else value.view(shape) for value in self.affine_in(dtype))
        y = x.to(dtype)
        y = y if weight is None else y * weight
        y = y if bias is None else y + bias
        return y.to(x.dtype)


class GroupNorm(ImagewiseNorm):
    """Normalises each image over groups of channels and all positions (Wu & He 2018).

    Args:
        num_features: channels C.
        groups: number of groups; must divide C.
        options: those of `ImagewiseNorm`.
    """

    name = "group"
    OPTIONS: ClassVar[Mapping[str, Option]] = {"groups": Option("int", 8, minimum=1, shown=True), **IMAGE_OPTIONS}
    groups: int

    def __init__(self, num_features: int, **options: Any) -> None:
        super().__init__(num_features, **options)
        if num_features % self.group_count():
            raise UserError(
                f"norm '{self.spec}': {num_features} channels do not divide into {self.group_count()} groups"
            )

    def group_count(self) -> int:
        """Into how many groups the channels are divided."""
        return self.groups

    def rows(self, x: Tensor) -> Tensor:
        """See the base class."""
        groups = self.group_count()
        return x.reshape(1, len(x) * groups, self.num_features // groups, *x.shape[2:])

    def unrows(self, rows: Tensor, x: Tensor) -> Tensor:
        """See the base class."""
        return _in_layout_of(x, rows.reshape(x.shape))

    def normalise_by_l2(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See the base class."""
        return F.group_norm(x, self.group_count(), weight, bias, self.eps)


class LayerNorm(GroupNorm):
    """Normalises each image over all channels and positions: one group; weight and bias per channel."""

    name = "layer"
    OPTIONS = IMAGE_OPTIONS

    def group_count(self) -> int:
        """See the base class."""
        return 1


class InstanceNorm(GroupNorm):
    """Normalises each channel of each image over its positions: a group per channel."""

    name = "instance"
    OPTIONS = IMAGE_OPTIONS

    def group_count(self) -> int:
        """See the base class."""
        return self.num_features


class PositionNorm(ImagewiseNorm):
    """Normalises each position of each image over its channels.

    What torch's LayerNorm does to the tokens of a transformer, and ConvNeXt's to the pixels of an image.

    Args:
        num_features: channels C.
        channel_dim: where the channels are: 1 for (N, C, *), -1 for (N, *, C).
        options: those of `ImagewiseNorm`.
    """

    name = "position"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **IMAGE_OPTIONS,
        "channel_dim": Option("int", 1, minimum=-1, maximum=1),
    }
    channel_dim: int

    def rows(self, x: Tensor) -> Tensor:
        """See the base class."""
        return x.movedim(self.channel_dim, -1).reshape(1, -1, self.num_features)

    def unrows(self, rows: Tensor, x: Tensor) -> Tensor:
        """See the base class."""
        last = x.movedim(self.channel_dim, -1)
        return _in_layout_of(x, rows.reshape(last.shape).movedim(-1, self.channel_dim))

    def normalise_by_l2(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """See the base class."""
        y = F.layer_norm(x.movedim(self.channel_dim, -1), (self.num_features,), weight, bias, self.eps)
        return _in_layout_of(x, y.movedim(-1, self.channel_dim))


def _in_layout_of(x: Tensor, y: Tensor) -> Tensor:
    """Bring y to the memory layout of x."""
    for layout, dims in ((torch.channels_last, 4), (torch.channels_last_3d, 5)):
        if x.dim() == dims and x.is_contiguous(memory_format=layout) and not x.is_contiguous():
            return y.contiguous(memory_format=layout)
    return y.contiguous()
