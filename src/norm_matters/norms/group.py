"""Norms per image: group, layer and instance norm, by the standard deviation, as torch has them."""

from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor
from torch.nn import functional as F

from norm_matters.core.errors import UserError
from norm_matters.norms.base import AFFINE_OPTIONS, AffineNorm
from norm_matters.norms.spec import Option


class GroupNorm(AffineNorm):
    """Normalises each image over groups of channels and all positions (Wu & He 2018).

    Training and evaluation are the same: nothing is tracked.

    Args:
        num_features: channels C.
        groups: number of groups; must divide C.
        options: those of `AffineNorm`.
    """

    name = "group"
    OPTIONS: ClassVar[Mapping[str, Option]] = {"groups": Option("int", 8, minimum=1, shown=True), **AFFINE_OPTIONS}
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

    def normalise(self, x: Tensor) -> Tensor:
        """See the base class.

        Raises:
            ValueError: a group holds one value only.
        """
        groups = self.group_count()
        if x[:1].numel() // groups == 1:
            raise ValueError(f"{self.label()} needs more than one value per group, got {tuple(x.shape)}")
        dtype = self.compute_dtype(x)
        return F.group_norm(x.to(dtype), groups, *self.affine_in(dtype), self.eps).to(x.dtype)


class LayerNorm(GroupNorm):
    """Normalises each image over all channels and positions: one group; weight and bias per channel."""

    name = "layer"
    OPTIONS = AFFINE_OPTIONS

    def group_count(self) -> int:
        """See the base class."""
        return 1


class InstanceNorm(GroupNorm):
    """Normalises each channel of each image over its positions: a group per channel."""

    name = "instance"
    OPTIONS = AFFINE_OPTIONS

    def group_count(self) -> int:
        """See the base class."""
        return self.num_features
