"""Ghost batch norm: statistics over parts of the batch (Hoffer, Hubara & Soudry 2017)."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

import torch
from torch import Tensor

from norm_matters.norms.base import activate
from norm_matters.norms.batchwise import BATCH_OPTIONS
from norm_matters.norms.composite import BASE, CompositeNorm
from norm_matters.norms.reduce import accumulator, channel_count
from norm_matters.norms.spec import Option
from norm_matters.norms.statistic import normalise_by


def group_sizes(images: int, size: int) -> list[int]:
    """How a batch is divided: into the number of groups nearest to `images / size` (a half rounds down; at least
    one), the groups as equal as possible, the larger ones first."""
    count = max(1, (2 * images + size - 1) // (2 * size))
    return [images // count + (group < images % count) for group in range(count)]


class GhostNorm(CompositeNorm):
    """Batch norm over groups of `size` consecutive images, each by its own mean and the base's sigma, in training.

    A batch that is no multiple of `size` is divided evenly (see `group_sizes`). The running statistics take the mean
    of the groups' statistics, weighted by their values. With `sync` the groups stay on their rank, and these means
    are taken over the groups of all ranks.

    Args:
        num_features: channels C.
        size: images per group.
        base: spec of the batch norm whose sigma is taken.
        options: those of `BatchwiseNorm`.
    """

    name = "ghost"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        "size": Option("int", 32, minimum=1, shown=True),
        "base": BASE,
        **BATCH_OPTIONS,
    }
    size: int

    def normalise_batch(
        self, x: Tensor, residual: Tensor | None = None, *, relu: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `BatchwiseNorm`.

        Raises:
            ValueError: a group has one value per channel only.
        """
        shared = self.reducer()
        sizes = group_sizes(len(x), self.size)
        if channel_count(x[: sizes[-1]]) < 2:
            raise ValueError(
                f"{self.label()} needs more than one value per channel in each group, got {tuple(x.shape)}"
            )
        weight, bias = self.affine_in(accumulator(x))
        outputs, totals = [], torch.zeros((2, self.num_features), dtype=accumulator(x), device=x.device)
        for part in x.split(sizes):
            n = channel_count(part)
            y, mean, var = normalise_by(
                part,
                weight,
                bias,
                eps=self.eps,
                statistic=self.statistic_for(n),
                dtype=self.compute_dtype(x),
                n=n,
                reducer=replace(shared, group=None),
            )
            outputs.append(y)
            totals = totals + n * torch.stack([mean, self.tracked(var, n)])
        mean, var = shared.share(totals) / shared.count(x)
        return activate(torch.cat(outputs), residual, relu=relu), mean, var
