"""What a kernel has to know of a statistic."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Estimator:
    """An estimate of sigma that has kernels of its own.

    Attributes:
        kind: `l2`: sqrt(mean d^2); `l1`: mean |d|; `topk`: the mean of the k largest |d|; `mean`: 1.
        constant: what the statistic is multiplied by; 1 for `l2` and `mean`.
        k: of `topk`.
    """

    kind: Literal["l2", "l1", "topk", "mean"]
    constant: float = 1.0
    k: int = 0
