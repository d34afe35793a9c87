"""Batch norm that training leaves as it is: for networks that are fine-tuned with small batches."""

from collections.abc import Mapping
from dataclasses import replace
from typing import ClassVar

from norm_matters.norms.batchwise import BATCH_OPTIONS
from norm_matters.norms.l2 import L2Norm
from norm_matters.norms.spec import Option


class FrozenNorm(L2Norm):
    """`l2:frozen=all` by another name: normalises by its running statistics always; weight and bias are not trained.

    What torchvision's FrozenBatchNorm2d does; the state has the names of nn.BatchNorm2d. Arguments as in
    `BatchwiseNorm`; `unfreeze_norm` makes it an l2.
    """

    name = "frozen"
    OPTIONS: ClassVar[Mapping[str, Option]] = {
        **BATCH_OPTIONS,
        "frozen": replace(BATCH_OPTIONS["frozen"], default="all"),
    }
    # No statistic of its own that another norm could take.
    composite = True
